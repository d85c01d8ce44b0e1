"""Tensor layouts of other programs: the names in their files, and which part of our tensors each one holds.

A layout is a list of parts that works in both directions: our tensors are cut into parts, or joined from them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minimind.model import MiniMindForCausalLM, ModelConfig
from minimind.model.router import BIAS_NAME

Layout = Literal["fused", "per_expert", "per_shared_expert", "ernie4_5_moe", "glm4_moe"]
"""fused: this project's own names. per_expert: a matrix for each expert. per_shared_expert: and for each shared one.
ernie4_5_moe, glm4_moe: per_expert, and what these architectures of transformers have besides."""

LAYOUTS: dict[str, Layout] = {"ernie4_5_moe": "ernie4_5_moe", "glm4_moe": "glm4_moe"}
"""By `model_type` of transformers; per_expert for all others."""

_TIED_NAME = "lm_head.weight"


@dataclass(frozen=True)
class FilePart:
    """One tensor of a file."""

    name: str
    shape: tuple[int, ...]
    own: str | None
    """The tensor of ours that it is part of; None: zeros that the architecture wants and ours does without."""
    index: tuple[int | slice, ...] = ()
    """Where in it."""
    rotary_pairs: int = 0
    """Above 0: the rows are those of heads of so many rotary pairs, each pair's two rows side by side there."""


def own_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of our model; a tied matrix once."""
    with torch.device("meta"):
        state = MiniMindForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del state[_TIED_NAME]
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def lay_out(config: ModelConfig, layout: Layout) -> list[FilePart]:
    """The parts of a model in a layout, those of one tensor of ours one behind the other."""
    parts: list[FilePart] = []
    for name, shape in own_shapes(config).items():
        parts += [FilePart(name, shape, name)] if layout == "fused" else _split(config, layout, name, shape)
    if layout in ("ernie4_5_moe", "glm4_moe") and not config.router_bias_update_rate:
        # These routers always have a selection bias.
        for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
            prefix = f"model.layers.{layer}.mlp."
            parts.append(FilePart(*_bias(prefix, layout, config), own=None))
    return parts


def _split(config: ModelConfig, layout: Layout, name: str, shape: tuple[int, ...]) -> list[FilePart]:
    prefix, _, last = name.partition("mlp.")
    prefix += "mlp."
    if last.startswith("experts."):
        return _split_experts(prefix, name, shape)
    if last.startswith("shared_experts.") and layout == "per_shared_expert":
        return _split_shared(config, prefix, name, shape)
    if last == BIAS_NAME:
        return [FilePart(*_bias(prefix, layout, config), own=name)]
    interleaved = layout == "ernie4_5_moe" and name.endswith(("q_proj.weight", "k_proj.weight"))
    return [FilePart(name, shape, name, rotary_pairs=config.head_size // 2 if interleaved else 0)]


def _split_experts(prefix: str, name: str, shape: tuple[int, ...]) -> list[FilePart]:
    num_experts, rows, columns = shape
    parts = []
    for expert in range(num_experts):
        here = f"{prefix}experts.{expert}"
        if name.endswith("down_proj"):
            parts.append(FilePart(f"{here}.down_proj.weight", (rows, columns), name, (expert,)))
        else:
            half = rows // 2
            parts.append(FilePart(f"{here}.gate_proj.weight", (half, columns), name, (expert, slice(0, half))))
            parts.append(FilePart(f"{here}.up_proj.weight", (half, columns), name, (expert, slice(half, rows))))
    return parts


def _split_shared(config: ModelConfig, prefix: str, name: str, shape: tuple[int, ...]) -> list[FilePart]:
    """N shared experts of width I are one of width N * I."""
    size, matrix = config.expert_feed_forward_size, name.rsplit(".", 2)[-2]
    parts = []
    for expert in range(config.n_shared_experts):
        width = slice(expert * size, (expert + 1) * size)
        here = f"{prefix}shared_experts.{expert}.{matrix}.weight"
        if matrix == "down_proj":
            parts.append(FilePart(here, (shape[0], size), name, (slice(None), width)))
        else:
            parts.append(FilePart(here, (size, shape[1]), name, (width,)))
    return parts


def _bias(prefix: str, layout: Layout, config: ModelConfig) -> tuple[str, tuple[int, ...]]:
    """Name and shape of a router's selection bias."""
    if layout == "ernie4_5_moe":
        return f"{prefix}moe_statics.{BIAS_NAME}", (1, config.num_experts)
    return f"{prefix}gate.{BIAS_NAME}" if layout == "glm4_moe" else prefix + BIAS_NAME, (config.num_experts,)


def cut_part(part: FilePart, read_own: Callable[[str], Tensor]) -> Tensor:
    """A part out of the tensor of ours that holds it."""
    if part.own is None:
        return torch.zeros(part.shape)
    piece = read_own(part.own)[part.index]
    if part.rotary_pairs:
        piece = piece.unflatten(0, (-1, 2, part.rotary_pairs)).transpose(1, 2)
    return piece.reshape(part.shape)


def join_parts(parts: Sequence[FilePart], shape: Sequence[int], read: Callable[[str], Tensor]) -> Tensor:
    """A tensor of ours from all its parts."""
    if len(parts) == 1 and not parts[0].rotary_pairs:
        return read(parts[0].name).reshape(tuple(shape))
    whole: Tensor | None = None
    for part in parts:
        piece = read(part.name)
        if part.rotary_pairs:
            piece = piece.unflatten(0, (-1, part.rotary_pairs, 2)).transpose(1, 2)
        if whole is None:
            whole = torch.empty(tuple(shape), dtype=piece.dtype)
        whole[part.index] = piece.reshape(whole[part.index].shape)
    assert whole is not None and math.prod(shape) == sum(math.prod(part.shape) for part in parts)
    return whole


def keep_last(read: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """`read`, with the last tensor kept: the parts of one tensor are asked for one behind the other."""
    kept: dict[str, Tensor] = {}

    def read_or_keep(name: str) -> Tensor:
        if name not in kept:
            kept.clear()
            kept[name] = read(name)
        return kept[name]

    return read_or_keep


def group_by_own(parts: Sequence[FilePart]) -> Mapping[str, list[FilePart]]:
    """The parts of each tensor of ours."""
    groups: dict[str, list[FilePart]] = {}
    for part in parts:
        if part.own is not None:
            groups.setdefault(part.own, []).append(part)
    return groups
