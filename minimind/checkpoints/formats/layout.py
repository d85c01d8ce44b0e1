"""Tensor layouts of other programs: the names in their files, and which part of our tensors each one holds.

A layout is a list of parts that works in both directions: our tensors are cut into parts, or joined from them.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minimind.model import MiniMindForCausalLM, ModelConfig
from minimind.model.pretrained import TIED_NAME
from minimind.model.router import BIAS_NAME

Layout = Literal["fused", "per_expert", "per_shared_expert", "ernie4_5_moe", "glm4_moe", "gguf"]
"""fused: this project's own names. per_expert: a matrix for each expert. per_shared_expert: and for each shared one.
ernie4_5_moe, glm4_moe: per_expert, and what these architectures of transformers have besides. gguf: llama.cpp's."""

LAYOUTS: dict[str, Layout] = {"ernie4_5_moe": "ernie4_5_moe", "glm4_moe": "glm4_moe"}
"""By `model_type` of transformers; per_expert for all others."""


@dataclass(frozen=True)
class FilePart:
    """One tensor of a file."""

    name: str
    shape: tuple[int, ...]
    own: str | None
    """The tensor of ours that it is part of; None: zeros that the architecture wants and ours does without."""
    index: tuple[int | slice | None, ...] = ()
    """Where in it."""
    rotary_pairs: int = 0
    """Above 0: the rows are those of heads of so many rotary pairs, each pair's two rows side by side there."""


def own_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of our model; a tied matrix once."""
    with torch.device("meta"):
        state = MiniMindForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del state[TIED_NAME]
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def lay_out(config: ModelConfig, layout: Layout) -> list[FilePart]:
    """The parts of a model in a layout, those of one tensor of ours one behind the other."""
    own = own_shapes(config)
    if layout == "fused":
        return [FilePart(name, shape, name) for name, shape in own.items()]
    if layout == "gguf":
        return [part for name, shape in own.items() for part in _split_gguf(config, name, shape)]
    parts = [part for name, shape in own.items() for part in _split(config, layout, name, shape)]
    if layout in ("ernie4_5_moe", "glm4_moe") and not config.router_bias_update_rate:
        # These routers always have a selection bias.
        for layer in filter(config.has_experts, range(config.num_hidden_layers)):
            parts.append(_bias_part(config, layout, f"model.layers.{layer}.mlp.", own=None))
    return parts


def _split(config: ModelConfig, layout: Layout, name: str, shape: tuple[int, ...]) -> Iterator[FilePart]:
    prefix, _, last = name.partition("mlp.")
    prefix += "mlp."
    matrix = last.removesuffix(".weight").rpartition(".")[2]
    if last == "experts.gate_up_proj":
        half = shape[1] // 2
        for expert in range(shape[0]):
            here = f"{prefix}experts.{expert}"
            yield FilePart(f"{here}.gate_proj.weight", (half, shape[2]), name, (expert, slice(half)))
            yield FilePart(f"{here}.up_proj.weight", (half, shape[2]), name, (expert, slice(half, None)))
    elif last == "experts.down_proj":
        for expert in range(shape[0]):
            yield FilePart(f"{prefix}experts.{expert}.down_proj.weight", shape[1:], name, (expert,))
    elif last.startswith("shared_experts.") and layout == "per_shared_expert":
        size, is_down = config.expert_feed_forward_size, matrix == "down_proj"
        for expert in range(config.n_shared_experts):  # N shared experts of width I are one of width N * I
            width = slice(expert * size, (expert + 1) * size)
            part_shape, index = ((shape[0], size), (slice(None), width)) if is_down else ((size, shape[1]), (width,))
            yield FilePart(f"{prefix}shared_experts.{expert}.{matrix}.weight", part_shape, name, index)
    elif last == BIAS_NAME:
        yield _bias_part(config, layout, prefix, name)
    else:
        is_interleaved = layout == "ernie4_5_moe" and name.endswith(("q_proj.weight", "k_proj.weight"))
        yield FilePart(name, shape, name, rotary_pairs=config.head_size // 2 if is_interleaved else 0)


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_up_proj": "ffn_{}_exps", "mlp.experts.down_proj": "ffn_down_exps",
}  # fmt: skip


def _split_gguf(config: ModelConfig, name: str, shape: tuple[int, ...]) -> Iterator[FilePart]:
    found = re.fullmatch(r"(model\.layers\.\d+\.)?(.+?)(\.weight|\.bias)?", name)
    assert found is not None
    layer = (found[1] or "").replace("model.layers", "blk")
    theirs = f"{layer}{_GGUF_NAMES[found[2]]}{found[3] or '.weight'}"
    if name.endswith("gate_up_proj"):
        half = shape[1] // 2
        for kind, rows in (("gate", slice(half)), ("up", slice(half, None))):
            yield FilePart(theirs.format(kind), (shape[0], half, shape[2]), name, (slice(None), rows))
    else:
        # Llama's queries and keys lie there as Meta's files have them.
        is_interleaved = (
            not config.qk_norm and not config.attention_bias and theirs.endswith(("_q.weight", "_k.weight"))
        )
        yield FilePart(theirs, shape, name, rotary_pairs=config.head_size // 2 if is_interleaved else 0)


def _bias_part(config: ModelConfig, layout: Layout, prefix: str, own: str | None) -> FilePart:
    """A router's selection bias."""
    if layout == "ernie4_5_moe":
        return FilePart(f"{prefix}moe_statics.{BIAS_NAME}", (1, config.num_experts), own, (None,))
    return FilePart(f"{prefix}{'gate.' if layout == 'glm4_moe' else ''}{BIAS_NAME}", (config.num_experts,), own)


def cut_part(part: FilePart, read_own: Callable[[str], Tensor]) -> Tensor:
    """A part out of the tensor of ours that holds it."""
    if part.own is None:
        return torch.zeros(part.shape)
    piece = read_own(part.own)[part.index]
    if part.rotary_pairs:
        piece = piece.unflatten(0, (-1, 2, part.rotary_pairs)).transpose(1, 2).flatten(0, 2)
    return piece


def join_parts(parts: Sequence[FilePart], shape: Sequence[int], read: Callable[[str], Tensor]) -> Tensor:
    """A tensor of ours from all its parts."""
    whole: Tensor | None = None
    for part in parts:
        piece = read(part.name)
        if part.rotary_pairs:
            piece = piece.unflatten(0, (-1, part.rotary_pairs, 2)).transpose(1, 2).flatten(0, 2)
        if not part.index:
            return piece
        if whole is None:
            whole = torch.empty(tuple(shape), dtype=piece.dtype)
        whole[part.index] = piece
    assert whole is not None
    return whole
