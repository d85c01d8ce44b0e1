"""Training adapters on a frozen model, or a part of it: whatever ranks and stage, the base untouched, files whole."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest import approx
from training_runs import EXPERTS, RankPool, flags_for, losses, rank_pool, train

from minimind.checkpoint import main as checkpoint_main
from minimind.checkpoints.consolidate import TrainingCheckpoint
from minimind.checkpoints.folder import list_checkpoints
from minimind.checkpoints.formats.load_model import load_model, load_weights
from minimind.checkpoints.formats.source import open_source
from minimind.checkpoints.manifest import CheckpointError, read_manifest
from minimind.checkpoints.safe_load import read_states
from minimind.errors import UserError
from minimind.export import main as export_main
from minimind.files import hash_file
from minimind.model.config import ModelConfig
from minimind.model.tuning import LoRA, trained_shapes

LORA = {"lora_rank": 4, "lr": 0.02, "steps": 4}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    yield from rank_pool(2)


@pytest.fixture(scope="module")
def base(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "base"
    train(flags_for(tiny_corpus, run_dir, steps=2, save_every=0))
    return run_dir


def flags(corpus: Path, base: Path, run_dir: Path, **others: Any) -> list[str]:
    return flags_for(corpus, run_dir, **{**LORA, "init_from": base, **others})


@pytest.fixture(scope="module")
def plain(tiny_corpus: Path, base: Path) -> Path:
    """One rank, ZeRO 1."""
    run_dir = base.parent / "plain"
    code, printed = train(flags(tiny_corpus, base, run_dir, eval_every=2))
    assert code == 0 and "; 1,408 trained" in printed
    return run_dir


def newest(run_dir: Path) -> Path:
    return list_checkpoints(run_dir)[-1]


def held(run_dir: Path) -> dict[str, torch.Tensor]:
    """What the newest checkpoint holds by itself."""
    checkpoint = TrainingCheckpoint(newest(run_dir))
    return {
        f"{name} {key}": checkpoint.read(name, key).clone() for name in checkpoint.shapes for key in checkpoint.keys
    }


def assert_same(a: Path, b: Path) -> None:
    assert losses(a) == losses(b)
    first, second = held(a), held(b)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (3, "bf16")])
def test_ranks_and_stages_give_the_same_losses_and_a_resume_is_exact(
    pool: RankPool, plain: Path, base: Path, tiny_corpus: Path, tmp_path: Path, stage: int, precision: str
) -> None:
    sealed = hash_file(newest(base) / "manifest.json")
    settings = {"stage": stage, "precision": precision, "activation_checkpointing": stage == 3}
    expected = approx(list(losses(plain).values()), rel=1e-5 if precision == "fp32" else 1e-2)
    pool.run(train, flags(tiny_corpus, base, tmp_path / "whole", **settings))
    assert list(losses(tmp_path / "whole").values()) == expected
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(newest(tmp_path / "run"))
    pool.run(train, flags(tiny_corpus, base, tmp_path / "run", **settings))
    assert_same(tmp_path / "whole", tmp_path / "run")
    # And on one rank of another stage, cut anew.
    shutil.rmtree(newest(tmp_path / "run"))
    settings["stage"] = (stage + 2) % 4
    code, printed = train(flags(tiny_corpus, base, tmp_path / "run", **settings))
    assert code == 0 and "its part of the files" in printed
    assert list(losses(tmp_path / "run").values()) == expected
    assert hash_file(newest(base) / "manifest.json") == sealed


def test_a_checkpoint_holds_the_adapters_alone_and_the_base_stays_bit_for_bit(plain: Path, base: Path) -> None:
    folder = newest(plain)
    manifest = read_manifest(folder)
    wanted = trained_shapes(ModelConfig.from_dict(manifest.model), LoRA(4, 8.0))
    assert TrainingCheckpoint(folder).shapes == wanted
    module = read_states(folder / "mp_rank_00_model_states.pt")["module"]
    assert set(module) == set(wanted), "DeepSpeed's file holds more than the adapters"
    before, after = open_source(base), open_source(plain)
    assert after.adapters is not None and after.adapters.base == newest(base)
    for name in before.shapes:
        is_adapted = LoRA(4, 8.0).has(name)
        assert torch.equal(before.read(name), after.read(name)) != is_adapted, name
    assert min(losses(plain).values()) < losses(plain)[1]


def test_every_command_reads_base_and_adapters(
    plain: Path, base: Path, tmp_path: Path, tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading compares the probe loss of the merged model with that of the engine."""
    model, _ = load_model(plain)
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    expected = model(tokens).logits
    assert not torch.allclose(load_model(base)[0](tokens).logits, expected, atol=1e-3)
    for form in ("minimind", "pth"):
        export_main(["--run-dir", str(plain), "--output", str(tmp_path / form), "--format", form])
        assert torch.equal(load_weights(tmp_path / form)(tokens).logits, expected)
    export_main(["--run-dir", str(plain), "--output", str(tmp_path / "peft"), "--format", "peft"])
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"] == 4
    checkpoint_main(["average", *map(str, list_checkpoints(plain)), "--output", str(tmp_path / "mean")])
    assert load_weights(tmp_path / "mean").model.embed_tokens.weight.shape == (256, 16)
    # A new run begins where it stopped: its adapters merged, new ones beside them. Every file is hashed once.
    hashed: list[Path] = []

    def hash_noting(path: Path) -> str:
        hashed.append(path.resolve())
        return hash_file(path)

    monkeypatch.setattr("minimind.checkpoints.manifest.hash_file", hash_noting)
    train(flags(tiny_corpus, plain, tmp_path / "more", steps=1, warmup_steps=0, lr=1e-9))
    monkeypatch.undo()
    for folder in (newest(plain), newest(base)):
        assert [hashed.count(folder.resolve() / record.path) for record in read_manifest(folder).files] == [1, 1]
    evaluated = [json.loads(line) for line in (plain / "metrics.jsonl").read_text().splitlines()]
    again = [json.loads(line) for line in (tmp_path / "more" / "metrics.jsonl").read_text().splitlines()]
    last = [[record["eval_loss"] for record in records if "eval_loss" in record][-1] for records in (evaluated, again)]
    assert last[0] == approx(last[1], rel=1e-5)
    assert len(TrainingCheckpoint(newest(tmp_path / "more")).shapes) == 14
    load_model(tmp_path / "more")


def test_a_base_that_moved_or_changed_is_one_line(
    plain: Path, base: Path, tmp_path: Path, tiny_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, run = tmp_path / "elsewhere" / "base", tmp_path / "elsewhere" / "run"
    shutil.copytree(plain, run)
    # Both moved together: found beside each other, when the old place is gone.
    hidden = base.with_name("hidden")
    shutil.copytree(base, there)
    os.rename(base, hidden)
    try:
        assert open_source(run).adapters.base.is_relative_to(there)  # type: ignore[union-attr]
        assert checkpoint_main(["verify", str(run)]) == 0
        shutil.rmtree(there)
        with pytest.raises(CheckpointError, match=rf"those of {base}.*which is not there; .* ln -s NEW"):
            open_source(run)
        assert checkpoint_main(["verify", str(run)]) == 1
        assert "step_00000004: valid, but" in capsys.readouterr().out
        base.symlink_to(hidden)
        open_source(run)
        base.unlink()
        shutil.copytree(hidden, base)
        manifest = newest(base) / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"step": 2', '"step": 3'))
        with pytest.raises(CheckpointError, match="has changed since"):
            open_source(run)
    finally:
        if base.exists():
            shutil.rmtree(base)
        os.rename(hidden, base)
    # A resume needs the very base, wherever it is now.
    other = tmp_path / "other"
    train(flags_for(tiny_corpus, other, steps=1, warmup_steps=0, seed=7))
    with pytest.raises(UserError, match="sha256 of --init-from's weights"):
        train(flags(tiny_corpus, other, run, steps=6))
    export_main(["--run-dir", str(base), "--output", str(tmp_path / "export"), "--format", "minimind"])
    train(flags(tiny_corpus, tmp_path / "export", tmp_path / "on export", steps=1, warmup_steps=0))
    weights = tmp_path / "export" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match=r"export, which has changed since \(sha256"):
        load_model(tmp_path / "on export")


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"init_from": None}, "lora_rank: frozen weights are those of a trained model; give it by --init-from"),
        ({"freeze": "embed"}, "freeze: 'embed': with --lora-rank every weight"),
        ({"lora_rank": 0, "lora_alpha": 3.0}, "lora_alpha: has no effect without adapters"),
        ({"lora_rank": 0, "freeze": "embedd"}, "freeze: 'embedd' is found in no parameter's name"),
        ({"lora_rank": 0, "freeze": "("}, r"freeze: '\(' is no regular expression"),
        ({"lora_rank": 0, "freeze": "."}, "freeze: '.' leaves nothing to train"),
        ({"lora_rank": 0, "freeze": "embed", "run": True}, "lora_rank 4 there, 0 here"),
        ({"lora_alpha": 3.0, "run": True}, "lora_alpha 8.0 there, 3.0 here"),
    ],
)
def test_what_cannot_be_is_refused(
    plain: Path, base: Path, tiny_corpus: Path, tmp_path: Path, settings: dict[str, Any], word: str
) -> None:
    run_dir = plain if settings.pop("run", False) else tmp_path / "run"
    command = flags(tiny_corpus, base, run_dir, **settings)
    if "init_from" in settings:
        place = command.index("--init-from")
        del command[place : place + 2]
    with pytest.raises(UserError, match=word):
        train(command)


FROZEN = {"lora_rank": 0, "freeze": r"embed_tokens|layers\.0\.self_attn", "lr": 1e-3}


def test_a_part_of_the_model_can_be_frozen(pool: RankPool, base: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    train(flags(tiny_corpus, base, tmp_path / "one", **FROZEN))
    for stage in (0, 3):
        pool.run(train, flags(tiny_corpus, base, tmp_path / f"two{stage}", stage=stage, **FROZEN))
        assert list(losses(tmp_path / f"two{stage}").values()) == approx(
            list(losses(tmp_path / "one").values()), rel=1e-5
        )
    shutil.rmtree(newest(tmp_path / "two3"))
    train(flags(tiny_corpus, base, tmp_path / "two3", **FROZEN))
    assert losses(tmp_path / "two3")[4] == approx(losses(tmp_path / "one")[4], rel=1e-5)
    before, after = open_source(base), open_source(tmp_path / "two3")
    for name in before.shapes:
        is_frozen = name.startswith(("model.embed_tokens", "model.layers.0.self_attn"))
        assert torch.equal(before.read(name), after.read(name)) == is_frozen, name
    load_model(tmp_path / "one")


MOE = {**EXPERTS, "initializer_range": 0.02}


def test_routed_experts_get_adapters_where_asked_and_stay_themselves(
    pool: RankPool, tiny_corpus: Path, tmp_path: Path
) -> None:
    train(flags_for(tiny_corpus, tmp_path / "base", **MOE, steps=2))
    targets = ("q", "o", "gate", "down", "experts")
    chosen = ["--lora-targets", *targets]
    train([*flags(tiny_corpus, tmp_path / "base", tmp_path / "one", **MOE), *chosen])
    for stage in (0, 3):
        run_dir = tmp_path / f"two{stage}"
        pool.run(train, [*flags(tiny_corpus, tmp_path / "base", run_dir, stage=stage, **MOE), *chosen])
        assert list(losses(run_dir).values()) == approx(list(losses(tmp_path / "one").values()), rel=1e-4)
    before, after = open_source(tmp_path / "base"), open_source(tmp_path / "two3")
    for name in before.shapes:
        assert torch.equal(before.read(name), after.read(name)) != LoRA(4, 8.0, targets).has(name), name
    load_model(tmp_path / "two3")
    with pytest.raises(UserError, match=r"has experts.*export it merged"):
        peft = ["--output", str(tmp_path / "peft"), "--format", "peft"]
        export_main(["--run-dir", str(tmp_path / "one"), *peft])
    with pytest.raises(UserError, match=r"ep_size: .* leave ep_size out"):
        train(flags(tiny_corpus, tmp_path / "base", tmp_path / "no", ep_size=1, **MOE))
