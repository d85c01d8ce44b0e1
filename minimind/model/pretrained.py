"""A model's folder: `config.json` beside `model.safetensors`, MiniMind's own form. No pickle, so loading runs no code.

Reads and writes tensors by name; refuses to know the modules they belong to.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minimind.errors import UserError
from minimind.files import fsync_folder, replace_file, temporary_name
from minimind.model.config import ModelConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MODEL_TYPE = "minimind"
# The second name of a tied matrix; the file holds the first only.
_TIED_NAME = "lm_head.weight"


def write_pretrained(folder: str | Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write a model's config and tensors into `folder`, made if need be; each file appears whole or not at all.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    folder = Path(folder)
    kept = {
        name: tensor.detach().contiguous()
        for name, tensor in tensors.items()
        if not (config.tie_word_embeddings and name == _TIED_NAME)
    }
    weights = folder / WEIGHTS_FILE
    temporary = temporary_name(weights)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(kept, temporary, metadata={"format": "pt"})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, weights)
        fsync_folder(folder)
        text = json.dumps({"model_type": MODEL_TYPE, **config.to_dict()}, indent=2)
        replace_file(folder / CONFIG_FILE, text + "\n")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: the model could not be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_config(folder: str | Path) -> ModelConfig:
    """The config in `folder`. Raises `UserError` where there is none, or one of another kind of model."""
    path = Path(folder) / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable model config: {error}") from error
    if not isinstance(values, dict) or values.pop("model_type", None) != MODEL_TYPE:
        raise UserError(f"{path}: not a MiniMind model (its model_type must be {MODEL_TYPE!r})")
    try:
        return ModelConfig.from_dict(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_pretrained(folder: str | Path, device: torch.device | str = "cpu") -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config in `folder`, and its tensors on `device`. Raises `UserError` on a missing or damaged file."""
    config = read_config(folder)
    path = Path(folder) / WEIGHTS_FILE
    try:
        return config, load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not readable weights (missing, cut short or damaged): {error}") from error


def check_fit(folder: str | Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise `UserError` unless `found` has the names and shapes of `expected`."""
    path = Path(folder) / WEIGHTS_FILE
    for name in sorted(expected.keys() | found.keys()):
        if name not in expected:
            raise UserError(f"{path}: tensor {name} has no place in the model that {CONFIG_FILE} describes")
        if name not in found:
            raise UserError(f"{path}: tensor {name} of the model that {CONFIG_FILE} describes is missing")
        if found[name].shape != expected[name].shape:
            shapes = (
                f"{tuple(found[name].shape)}, the model that {CONFIG_FILE} describes has {tuple(expected[name].shape)}"
            )
            raise UserError(f"{path}: tensor {name} is {shapes}")
