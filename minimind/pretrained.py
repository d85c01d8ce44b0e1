"""A trained model from wherever it lies, with the tokenizer that belongs to it.

The one place that generation, evaluation and export load weights through. Knows nothing of prompts or data.
"""

import dataclasses
import math
from pathlib import Path

import torch

from minimind.errors import UserError
from minimind.model import MiniMindForCausalLM
from minimind.model.pretrained import CONFIG_FILE
from minimind.tokenizer import JSON_NAME, MODEL_NAME


def load_model(
    checkpoint: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[MiniMindForCausalLM, Path]:
    """The model in evaluation mode, and its tokenizer file.

    Args:
        checkpoint: an exported folder (config.json, model.safetensors and a tokenizer file).
        dtype: what to convert the weights to; None keeps the stored one.

    Raises:
        UserError: there is no model, a file is missing or damaged, or the weights do not fit.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        raise UserError(f"checkpoint {checkpoint} does not exist or is no folder")
    if not (checkpoint / CONFIG_FILE).is_file():
        raise UserError(f"checkpoint {checkpoint} holds no model: it has no {CONFIG_FILE}")
    tokenizer_file = find_tokenizer_file(checkpoint)
    return MiniMindForCausalLM.from_pretrained(checkpoint, device=device, dtype=dtype), tokenizer_file


def find_tokenizer_file(folder: Path) -> Path:
    """The tokenizer in a model's folder. Raises `UserError` when there is none."""
    for name in (MODEL_NAME, JSON_NAME):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} holds no tokenizer: neither {MODEL_NAME} nor {JSON_NAME}")


def stretch_context(model: MiniMindForCausalLM, factor: float, trained_length: int | None = None) -> None:
    """Let a trained model read `factor` times its context by YaRN (see `model.rope`); no weight changes.

    Args:
        trained_length: tokens of a training sequence; None: what the model's config says.

    Raises:
        UserError: a factor below 1, or one that cannot be.
    """
    length = model.config.rope_original_max_position_embeddings if trained_length is None else trained_length
    config = dataclasses.replace(model.config, rope_scaling_factor=factor, rope_original_max_position_embeddings=length)
    positions = max(config.max_position_embeddings, math.ceil(factor * length))
    # Rotary tables are computed from the config in each forward, so this is all there is to change.
    model.config = model.model.config = dataclasses.replace(config, max_position_embeddings=positions)
