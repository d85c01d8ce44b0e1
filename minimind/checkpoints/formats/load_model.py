"""Load a trained model and its tokenizer from any of the forms that `source` reads. Needs no DeepSpeed."""

import dataclasses
import functools
import math
import sys
from pathlib import Path

import torch

from minimind.checkpoints.consolidate import TrainingCheckpoint
from minimind.checkpoints.formats.source import ModelSource, find_tokenizer, open_source
from minimind.checkpoints.probe import check_probe_loss, probe_loss
from minimind.config.run_config import Precision
from minimind.data.tokenizer import JSON_NAME, MODEL_NAME, load_tokenizer
from minimind.errors import UserError
from minimind.inference.device import choose_device
from minimind.inference.language_model import LanguageModel
from minimind.model import MiniMindForCausalLM
from minimind.model.kernels.apply import apply_kernels
from minimind.model.router import BIAS_NAME


def load(
    checkpoint: str | Path,
    *,
    device: str | None = None,
    precision: Precision | None = None,
    tokenizer: str | Path | None = None,
) -> LanguageModel:
    """A trained model with its tokenizer, ready to generate: what Python and notebooks load one with.

    Args:
        checkpoint: a run (its newest valid checkpoint), one checkpoint, a folder of `minimind.export` or of the
            Hugging Face tools (Llama, Qwen3, Qwen3-MoE), or a `.pth` of jingyaogong/minimind.
        device: its name in torch; None: the accelerator if there is one.
        precision: None: bf16 on a GPU that has it, otherwise fp32.
        tokenizer: its file or folder, where none is stored beside the weights.

    Raises:
        UserError: there is no model, a file is missing or damaged, or the weights do not fit.
    """
    chosen, dtype = choose_device(device, precision)
    place = None if tokenizer is None else Path(tokenizer)
    model, tokenizer_file = load_model(Path(checkpoint), dtype=dtype, device=chosen, tokenizer=place)
    return LanguageModel(model, load_tokenizer(tokenizer_file))


def load_model(
    checkpoint: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    tokenizer: Path | None = None,
) -> tuple[MiniMindForCausalLM, Path]:
    """The model in evaluation mode and its tokenizer file: as `load`, for a chosen device and `dtype`, by default the
    type that the weights are stored in (float32 in a checkpoint)."""
    source = open_source(checkpoint)
    # Before the weights are read, which may take minutes.
    tokenizer_file = find_tokenizer_file(tokenizer or source.tokenizer_file or source.folder)
    return build_from_source(source, dtype=dtype, device=device), tokenizer_file


def load_weights(
    checkpoint: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> MiniMindForCausalLM:
    """`load_model` without a tokenizer, for `MiniMindForCausalLM.from_pretrained`."""
    return build_from_source(open_source(Path(checkpoint)), dtype=dtype, device=device)


def build_from_source(
    source: ModelSource, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> MiniMindForCausalLM:
    """The model of `source` in evaluation mode, one tensor beside it in memory at a time.

    Raises:
        CheckpointError: it is a training checkpoint and does not compute the loss that was stored when it was saved.
    """
    with torch.device("meta"):
        model = MiniMindForCausalLM(source.config)
    tensors = {}
    for name in source.shapes:
        tensor = source.read(name)
        # The routers' selection bias stays exact whatever the weights are rounded to.
        wanted = torch.float32 if name.endswith(BIAS_NAME) else dtype
        tensors[name] = tensor.to(device=device, dtype=wanted, copy=True)  # the tensor may be a view of the file
    model.load_state_dict(tensors, assign=True, strict=False)
    model.tie_weights()
    model.eval()
    apply_kernels(model, device)
    if source.checkpoint is not None:
        manifest, weight = source.checkpoint.manifest, model.lm_head.weight
        check_probe_loss(
            source.checkpoint.folder,
            manifest,
            lambda: probe_loss(model, model.config, weight.device),
            low_precision=manifest.precision != "fp32" or weight.dtype != torch.float32,
            find_differences=functools.partial(_find_differences, model, source.checkpoint),
        )
    return model


def _find_differences(model: MiniMindForCausalLM, checkpoint: TrainingCheckpoint) -> list[str]:
    """Tensors of the model that are not those of the checkpoint, or that the checkpoint itself has in two versions."""
    state = model.state_dict()

    def differs(name: str) -> bool:
        return not torch.equal(state[name].cpu(), checkpoint.read(name).to(state[name].dtype))

    return [name for name in checkpoint.shapes if name in state and differs(name)] or checkpoint.find_contradictions()


def find_tokenizer_file(place: Path) -> Path:
    """The tokenizer in a folder, or the file itself. Raises `UserError` when there is none."""
    found = find_tokenizer(place) if place.is_dir() else place
    if found is None or not found.is_file():
        raise UserError(f"{place} holds no tokenizer: neither {MODEL_NAME} nor {JSON_NAME}")
    return found


def stretch_context(model: MiniMindForCausalLM, factor: float, trained_length: int | None = None) -> None:
    """Let a trained model read `factor` times its context by YaRN (see `model.rope`); no weight changes.

    Args:
        trained_length: tokens of a training sequence; None: what the model's config says.

    Raises:
        UserError: a factor below 1, or one that cannot be.
    """
    config, known = model.config, model.config.rope_original_max_position_embeddings
    if config.rope_scaling_type != "yarn":
        way = config.rope_scaling_type
        raise UserError(
            f"rope_scaling_factor: this model was trained with {way} scaling; it cannot be stretched by YaRN"
        )
    length = trained_length or config.trained_length
    if known is None and trained_length is None:
        note = f"the model does not say at which length it was trained: YaRN takes {length}; if that is wrong, give "
        print(f"note: {note}--rope-original-max-position-embeddings", file=sys.stderr)
    elif known not in (None, length):
        print(
            f"note: rope_original_max_position_embeddings: {length} is taken, but this model was trained at {known}",
            file=sys.stderr,
        )
    config = dataclasses.replace(config, rope_scaling_factor=factor, rope_original_max_position_embeddings=length)
    positions = max(config.max_position_embeddings, math.ceil(factor * length))
    # Rotary tables are computed from the config in each forward, so this is all there is to change.
    model.config = model.model.config = dataclasses.replace(config, max_position_embeddings=positions)
