"""Files that would run code, are cut short or lie about themselves are refused by every way in."""

import json
import pickle
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers_for_tests import save_sentencepiece

from minimind.checkpoints.formats.averaging import write_average
from minimind.checkpoints.formats.load_model import load_model
from minimind.checkpoints.formats.pth import read_pth
from minimind.checkpoints.formats.source import open_source
from minimind.checkpoints.safetensors import SafetensorsFolder
from minimind.data.tokenizer import load_tokenizer
from minimind.errors import UserError
from minimind.evaluate import main as evaluate_main
from minimind.export import main as export_main
from minimind.generate import main as generate_main
from minimind.model import PRESETS, MiniMindForCausalLM


class Hostile:
    """Makes a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def write_hostile(kind: str, path: Path, mark: Path) -> None:
    """A bare pickle, or torch's own kinds of file, with code in it."""
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"model.norm.weight": Hostile(mark)}))
    else:
        content = {"model.norm.weight": Hostile(mark), "model.embed_tokens.weight": torch.zeros(2, 2)}
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A folder of ours in which everything is right."""
    folder = tmp_path_factory.mktemp("sound")
    MiniMindForCausalLM(PRESETS["tiny"]).save_pretrained(folder)
    save_sentencepiece(folder)
    return folder


def refuse(load, *args) -> None:
    with pytest.raises(UserError) as caught:
        load(*args)
    assert str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy"])
@pytest.mark.parametrize(
    "name",
    ["a.pth", "a.pt", "a.bin", "a.safetensors", "model.safetensors", "model.safetensors.index.json", "config.json",
     "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "manifest.json"],
)  # fmt: skip
def test_code_in_a_file_of_any_name_is_not_run(kind, name, sound, tmp_path, monkeypatch):
    mark = tmp_path / "it ran"
    write_hostile(kind, tmp_path / "proof", mark)
    torch.load(tmp_path / "proof", weights_only=False) if kind != "pickle" else pickle.loads(
        (tmp_path / "proof").read_bytes()
    )
    assert mark.exists(), "the file is not hostile, or this shows nothing"
    mark.unlink()

    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    write_hostile(kind, folder / name, mark)
    if name == "tokenizer.json":
        (folder / "tokenizer.model").unlink()
    if name.startswith("a."):
        refuse(open_source, folder / name)
        refuse(read_pth, folder / name)
        (folder / "config.json").unlink()
    commands = [generate_main, evaluate_main, export_main]
    flags = [["--prompt", "x"], ["--text", str(folder / "config.json")], ["--output", str(tmp_path / "out")]]
    if name.startswith("a.") or "index" in name:
        (folder / "model.safetensors").unlink()
    for command, more in zip(commands, flags, strict=True):
        refuse(command, ["--checkpoint", str(folder), *more])
    if name == "model.safetensors":
        refuse(MiniMindForCausalLM.from_pretrained, folder)
        refuse(SafetensorsFolder, folder)
    if name == "manifest.json":
        refuse(write_average, [folder], tmp_path / "out")
    if name.startswith("tokenizer"):
        refuse(load_tokenizer, folder / name)
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_a_hostile_training_checkpoint_is_refused_also_with_a_manifest_that_fits(tiny_corpus, tmp_path):
    from training_runs import flags_for, train

    from minimind.checkpoints.folder import list_checkpoints
    from minimind.checkpoints.manifest import CheckpointManifest, FileRecord, read_manifest
    from minimind.files import hash_file

    train(flags_for(tiny_corpus, tmp_path / "run", steps=2))
    (folder,) = list_checkpoints(tmp_path / "run")
    mark = tmp_path / "it ran"
    for file in sorted(folder.glob("*.pt")):
        before, manifest = file.read_bytes(), read_manifest(folder)
        write_hostile("zip", file, mark)
        records = [
            FileRecord(r.path, (folder / r.path).stat().st_size, hash_file(folder / r.path)) for r in manifest.files
        ]
        fields = {**vars(manifest), "files": tuple(records)}
        (folder / "manifest.json").write_text(CheckpointManifest(**fields).to_json())
        refuse(load_model, folder)
        refuse(open_source, tmp_path / "run")
        file.write_bytes(before)
        (folder / "manifest.json").write_text(manifest.to_json())
    assert not mark.exists()


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 5000, -1])
def test_weights_cut_short_are_named(sound, tmp_path, keep):
    shutil.copytree(sound, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors: not readable weights"):
        load_model(tmp_path / "model")
    torch.save(MiniMindForCausalLM(PRESETS["tiny"]).state_dict(), tmp_path / "a.pth")
    (tmp_path / "a.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:keep])
    with pytest.raises(UserError, match=r"a\.pth: "):
        open_source(tmp_path / "a.pth")


def test_an_index_cannot_point_elsewhere(sound, tmp_path):
    export_main(["--checkpoint", str(sound), "--output", str(tmp_path / "hf"), "--max-shard-size", "500KB"])
    index = tmp_path / "hf/model.safetensors.index.json"
    content = json.loads(index.read_text())
    assert len(set(content["weight_map"].values())) > 2
    outside = {name: "../" + file for name, file in content["weight_map"].items()}
    for changed, said in (
        ({"weight_map": outside}, "outside the folder"),
        ({}, "weight_map"),
        ([], "list indices"),
        ({"weight_map": {**content["weight_map"], "more": "model-00001-of-00003.safetensors"}}, "tensor more"),
        ({"weight_map": {"model.norm.weight": "nowhere.safetensors"}}, "nowhere"),
    ):
        index.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=said):
            open_source(tmp_path / "hf")
    first, *rest = content["weight_map"].items()
    index.write_text(json.dumps({"weight_map": dict(rest)}))
    with pytest.raises(UserError, match=f"tensor {first[0]} .* is missing"):
        open_source(tmp_path / "hf")


def test_a_folder_without_weights_says_what_is_missing(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has a config\.json, but neither"):
        open_source(tmp_path / "model")


def change_config(**changes):
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def change_weights(change, name="model.safetensors"):
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        if name == "model.safetensors":
            save_file(tensors, folder / name)
        else:
            (folder / "model.safetensors").unlink()
            (folder / "config.json").unlink()
            torch.save(tensors, folder / name)

    return rewrite


def convert(**dtypes):
    return lambda tensors: tensors.update({name: tensor.to(dtypes["to"]) for name, tensor in tensors.items()})


EXPERT = {name: torch.zeros(8, 8) for name in ("gate_proj", "up_proj", "down_proj")}
HOSTILE = {
    "layers": (change_config(num_hidden_layers=9_999), "hold 46 tensors, their config describes 9,999 layers"),
    "width": (change_config(hidden_size=64_000), "the model that its config describes has"),
    "vocabulary": (change_config(vocab_size=10**20), "vocab_size: 100000000000000000000"),
    "experts": (change_config(use_moe=True, num_experts=99_999), "no place in the model|is missing"),
    "more experts": (change_config(use_moe=True, num_experts=10**8), "num_experts: 100000000 is not a number from"),
    "theta": (change_config(rope_theta=1), "rope_theta: 1.0 is not"),
    "brackets": (lambda folder: (folder / "config.json").write_text("[" * 10**5), "no reasonable JSON"),
    "digits": (lambda folder: (folder / "config.json").write_text("9" * 10**4), "no reasonable JSON"),
    "brackets in an index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[" * 10**5), "not a readable index"
    ),
    "int32": (change_weights(convert(to=torch.int32)), "has type I32; weights are read as F32, BF16, F16, F64"),
    "fp8": (change_weights(convert(to=torch.float8_e4m3fn)), "has type F8_E4M3"),
    "fp8 in a .pth": (change_weights(convert(to=torch.float8_e4m3fn), "a.pth"), "floating-point tensor of 16 bits"),
    "a far layer in a .pth": (
        change_weights(lambda tensors: tensors.update({"model.layers.999999999.x": torch.zeros(1)}), "a.pth"),
        r"a\.pth: model config: num_hidden_layers: 1000000000 is not a number from 1 to 10000",
    ),
    "a far expert in a .pth": (
        change_weights(lambda tensors: tensors.update(
            {f"model.layers.0.mlp.experts.{number}.{name}.weight": value for number in (0, 99_998)
             for name, value in EXPERT.items()}), "a.pth"),
        "their config describes",
    ),
    "an empty projection in a .pth": (
        change_weights(
            lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.weight": torch.zeros(0, 64)}), "a.pth"
        ),
        "matrix model.layers.0.self_attn.q_proj.weight is missing or empty",
    ),
    "an empty norm in a .pth": (
        change_weights(
            lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.zeros(0)}), "a.pth"
        ),
        r"a\.pth: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_lies_about_itself_is_one_line_before_anything_is_built(name, sound, tmp_path):
    change, said = HOSTILE[name]
    shutil.copytree(sound, tmp_path / "model")
    change(tmp_path / "model")
    start = time.monotonic()
    with pytest.raises(UserError, match=said) as caught:
        load_model(tmp_path / "model")
    assert "\n" not in str(caught.value) and time.monotonic() - start < 20
