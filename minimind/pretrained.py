"""A trained model from wherever it lies, with the tokenizer that belongs to it.

The one place that generation, evaluation and export load weights through: an exported folder, a run, or one of its
checkpoints. Knows nothing of prompts or data, and needs no DeepSpeed.
"""

import dataclasses
import math
import sys
from pathlib import Path

import torch

from minimind.checkpoint_files import (
    MANIFEST_NAME,
    CheckpointError,
    CheckpointManifest,
    checkpoints_folder,
    newest_sound,
    verify,
)
from minimind.consolidate import TrainingCheckpoint
from minimind.errors import UserError
from minimind.model import MiniMindForCausalLM, ModelConfig
from minimind.model.pretrained import CONFIG_FILE
from minimind.probe import agrees, probe_loss
from minimind.tokenizer import JSON_NAME, MODEL_NAME

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_model(
    checkpoint: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[MiniMindForCausalLM, Path]:
    """The model in evaluation mode, and its tokenizer file.

    Args:
        checkpoint: an exported folder (config.json, model.safetensors and a tokenizer file), a run's folder (its newest
            sound checkpoint), or one checkpoint.
        dtype: what to convert the weights to; None keeps the stored one (float32 in a checkpoint).

    Raises:
        UserError: there is no model, a file is missing or damaged, or the weights do not fit.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        raise UserError(f"checkpoint {checkpoint} does not exist or is no folder")
    if (checkpoint / CONFIG_FILE).is_file():
        tokenizer_file = find_tokenizer_file(checkpoint)
        return MiniMindForCausalLM.from_pretrained(checkpoint, device=device, dtype=dtype), tokenizer_file
    if checkpoints_folder(checkpoint).is_dir():
        folder = newest_sound(checkpoint, lambda message: print(message, file=sys.stderr))
        if folder is None:
            raise UserError(f"checkpoint {checkpoint}: the run has not saved any")
        # It has been compared with its manifest while it was looked for.
        return load_checkpoint(folder, dtype=dtype, device=device), find_tokenizer_file(checkpoint)
    if (checkpoint / MANIFEST_NAME).is_file():
        verify(checkpoint)
        return load_checkpoint(checkpoint, dtype=dtype, device=device), find_tokenizer_file(checkpoint.parent.parent)
    raise UserError(
        f"checkpoint {checkpoint} holds no model: it is neither a run's folder, nor a checkpoint, nor an export "
        f"(with a {CONFIG_FILE})"
    )


def load_checkpoint(
    folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> MiniMindForCausalLM:
    """The model of a training checkpoint that has been compared with its manifest, one tensor in memory at a time.

    Raises:
        UserError: the files are of a kind that is not read, or do not fit the model that the manifest describes.
    """
    source = TrainingCheckpoint(folder)
    with torch.device("meta"):
        model = MiniMindForCausalLM(ModelConfig.from_dict(source.manifest.model))
    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    tensors = {}
    for name, tensor in source.state_dict():
        if name not in expected or tensor.shape != expected[name].shape:
            raise UserError(f"{folder}: tensor {name} {tuple(tensor.shape)} has no place in the model of its manifest")
        wanted = dtype if tensor.is_floating_point() else None
        # A copy, because the tensor is a view of the file.
        tensors[name] = torch.empty_like(tensor, dtype=wanted, device=device).copy_(tensor)
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        raise UserError(f"{folder}: tensor {missing[0]} of the model of its manifest is missing")
    model.load_state_dict(tensors, assign=True, strict=False)
    model.tie_weights()
    model.eval()
    prove(model, folder, source.manifest)
    return model


def prove(model: MiniMindForCausalLM, folder: Path, manifest: CheckpointManifest) -> None:
    """Compare a model's loss on the probe batch with the one that was saved in its checkpoint.

    Raises:
        CheckpointError: they differ: the weights were not read as they were trained.
    """
    if manifest.probe_loss is None:
        return
    weight = model.lm_head.weight
    loss = probe_loss(model, model.config, weight.device)
    if not agrees(
        manifest.probe_loss, loss, low_precision=manifest.precision != "fp32" or weight.dtype != torch.float32
    ):
        raise CheckpointError(
            f"{folder}: the probe batch has loss {loss:.6f} instead of {manifest.probe_loss:.6f}; its tensors were not "
            "read as they were saved"
        )


def find_tokenizer_file(folder: Path) -> Path:
    """The tokenizer in a model's folder. Raises `UserError` when there is none."""
    for name in (MODEL_NAME, JSON_NAME):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} holds no tokenizer: neither {MODEL_NAME} nor {JSON_NAME}")


def choose_device(device: str | None, precision: str | None) -> tuple[torch.device, torch.dtype]:
    """The device and the arithmetic that the flags name, or the best there is. Raises `UserError` for an absent one."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device} cannot be used: {str(error).splitlines()[0]}") from None
    if precision is None:
        precision = "bf16" if chosen.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return chosen, _DTYPES[precision]


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
