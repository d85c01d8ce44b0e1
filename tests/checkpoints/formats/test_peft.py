"""Adapters in PEFT's files: `peft` loads them on the exported base and computes what the merged model does."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from pytest import approx
from test_export import SHAPES, run_export, save_random

from minimind.checkpoints.formats import peft as peft_files
from minimind.checkpoints.formats.source import Adapters, ModelSource, open_source
from minimind.checkpoints.safetensors import write_safetensors
from minimind.errors import UserError
from minimind.files import write_json
from minimind.model import MiniMindForCausalLM, ModelConfig
from minimind.model.lora import merge
from minimind.model.tuning import LoRA, adapters_of, trained_shapes

LORA = LoRA(rank=4, alpha=6.0)
KINDS = ("qwen3", "llama", "qwen2")


def adapt(base: Path, config: ModelConfig) -> tuple[Adapters, MiniMindForCausalLM]:
    """Random adapters for the model in `base`, and the two merged."""
    generator = torch.Generator().manual_seed(1)
    shapes = trained_shapes(config, LORA)
    tensors = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    source = open_source(base)
    model = MiniMindForCausalLM(config).eval()
    state = {name: source.read(name) for name in source.shapes}
    for name in filter(LORA.has, state):
        state[name] = merge(state[name], *(tensors[part] for part in adapters_of(name)), LORA.scale)
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return Adapters(LORA, shapes, tensors.__getitem__, base), model


def write(folder: Path, config: ModelConfig, adapters: Adapters) -> Path:
    folder.mkdir()
    tensors = peft_files.adapter_tensors(config, adapters)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    write_safetensors(folder / peft_files.WEIGHTS_FILE, shapes, tensors.__getitem__)
    write_json(folder / peft_files.CONFIG_FILE, peft_files.adapter_config(config, adapters))
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_peft_loads_the_adapters_and_gives_our_logits(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = SHAPES[name]
    save_random(tmp_path / "base", config)
    adapters, merged = adapt(tmp_path / "base", config)
    folder = write(tmp_path / "adapter", config, adapters)
    run_export("--checkpoint", tmp_path / "base", "--output", tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokens = torch.randint(0, config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, expected = theirs(tokens).logits, merged(tokens).logits
        found = peft.PeftModel.from_pretrained(theirs, folder)(tokens).logits
    size = float(expected.abs().max())
    assert found == approx(expected, abs=1e-5 * size)
    assert float((plain - expected).abs().max()) > 1e-2 * size


def test_what_peft_cannot_hold_is_refused(tmp_path: Path) -> None:
    adapters = Adapters(LORA, {}, lambda name: torch.zeros(1), tmp_path)
    source = ModelSource(tmp_path, SHAPES["qwen3_moe"], {}, lambda name: torch.zeros(1), None, adapters=adapters)
    with pytest.raises(UserError, match=r"has experts, .* export it merged"):
        peft_files.require_adapters(source)
    with pytest.raises(UserError, match="holds no adapters"):
        peft_files.require_adapters(dataclasses.replace(source, adapters=None))


def test_the_config_names_what_is_adapted(tmp_path: Path) -> None:
    adapters = Adapters(dataclasses.replace(LORA, targets=("q", "down")), {}, lambda name: torch.zeros(1), tmp_path)
    values = json.loads(json.dumps(peft_files.adapter_config(SHAPES["qwen3"], adapters)))
    assert values["target_modules"] == ["down_proj", "q_proj"]
    assert (values["r"], values["lora_alpha"], values["base_model_name_or_path"]) == (4, 6.0, str(tmp_path))
