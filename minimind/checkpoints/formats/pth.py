"""The `.pth` files of jingyaogong/minimind: the current form, and the older one without QK-norm, with shared experts.

Such a file holds only tensors, so the config comes from their shapes and, where shapes do not show it, from the
published models. Read with `weights_only`: no code in a file is run.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind.checkpoints.formats.layout import Layout
from minimind.checkpoints.safe_load import load_states
from minimind.checkpoints.safetensors import WEIGHT_TYPES
from minimind.errors import UserError
from minimind.model.config import ModelConfig, default_intermediate_size
from minimind.model.presets import PRESETS
from minimind.model.pretrained import TIED_NAME

SUFFIXES = (".pth", ".pt")
# Tables of rotary positions that some versions of their model saved.
_NOT_WEIGHTS = re.compile(r"(^|\.)(freqs_cos|freqs_sin|pos_cis)$")
EMBEDDING, _LAYER = "model.embed_tokens.weight", "model.layers."


def read_pth(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, memory-mapped; from their resume files, those of the model.

    Raises:
        UserError: the file is of another kind, unreadable, refers to code, or holds anything but tensors.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"checkpoint {path} is not a supported file; give a folder or a file *{' or *'.join(SUFFIXES)}")
    content: Any = load_states(path, [], mmap=True)
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path}: not a file of weights: it holds no tensors by name")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.dtype not in WEIGHT_TYPES.values():
            raise UserError(f"{path}: not a file of weights: {name} is not a floating-point tensor of 16 bits or more")
    return {name: tensor for name, tensor in content.items() if not _NOT_WEIGHTS.search(name)}


def layout_of(config: ModelConfig) -> Layout:
    """The layout of a model in their files."""
    return "per_expert" if config.qk_norm else "per_shared_expert"


def choose_form(config: ModelConfig) -> Layout:
    """The layout in which their code computes this model: current with QK-norm, older without.

    Raises:
        UserError: their code has no such model; the message says why.
    """
    is_older = not config.qk_norm
    own_width = config.use_moe and config.expert_feed_forward_size != config.feed_forward_size
    top_1_norm = config.use_moe and config.num_experts_per_tok == 1 and config.norm_topk_prob
    for holds, what in (
        (config.rope_scaling_factor != 1, f"rope_scaling_factor={config.rope_scaling_factor}"),
        (config.attention_bias, "attention_bias"),
        (config.scoring_func != "softmax", f"scoring_func={config.scoring_func!r}"),
        (config.router_bias_update_rate, "a selection bias (router_bias_update_rate)"),
        (config.routed_scaling_factor != 1, f"routed_scaling_factor={config.routed_scaling_factor}"),
        (config.moe_residual, "residual experts (moe_residual)"),
        (config.first_k_dense_replace, f"first_k_dense_replace={config.first_k_dense_replace}"),
        (config.qk_norm and config.n_shared_experts, "shared experts together with qk_norm"),
        (is_older and top_1_norm, "norm_topk_prob with one expert a token and without qk_norm"),
        (is_older and not config.tie_word_embeddings, "an untied output matrix without qk_norm"),
        (is_older and config.head_dim is not None, "head_dim without qk_norm"),
        (is_older and own_width, "moe_intermediate_size without qk_norm"),
    ):
        if holds:
            raise UserError(f"jingyaogong/minimind has no model with {what}: it cannot be written as .pth")
    return layout_of(config)


def infer_config(path: Path, tensors: Mapping[str, Tensor], base: ModelConfig | None = None) -> ModelConfig:
    """The config of a file's model: from shapes, then from `base`, by default the published model of its kind.

    Shapes do not show the number of heads of the older form, `num_experts_per_tok`, `rms_norm_eps` and the like.

    Raises:
        UserError: the file holds another kind of model.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors or tensors[name].dim() != 2 or not tensors[name].numel():
            raise UserError(f"{path}: not weights of jingyaogong/minimind: matrix {name} is missing or empty")
        return tuple(tensors[name].shape)

    attention, mlp = f"{_LAYER}0.self_attn.", f"{_LAYER}0.mlp."
    moe = any(".mlp.experts." in name for name in tensors)
    q_norm = tensors.get(f"{attention}q_norm.weight")
    if base is None:
        current, older = ("minimind3-moe", "minimind2-moe") if moe else ("minimind3", "minimind2-small")
        base = PRESETS[older if q_norm is None else current]
    vocab_size, hidden_size = shape(EMBEDDING)
    query_size, key_size = shape(f"{attention}q_proj.weight")[0], shape(f"{attention}k_proj.weight")[0]
    size = max(1, query_size // base.num_attention_heads if q_norm is None else q_norm.numel())
    feed_forward = shape(f"{mlp}experts.0.gate_proj.weight" if moe else f"{mlp}gate_proj.weight")[0]
    heads = query_size // size
    default_size = default_intermediate_size(hidden_size) if base.intermediate_size is None else 0
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": _count(tensors, _LAYER),
        "num_attention_heads": heads,
        "num_key_value_heads": key_size // size,
        "head_dim": None if size * heads == hidden_size and hidden_size % heads == 0 else size,
        "intermediate_size": None if feed_forward == default_size else feed_forward,
        "tie_word_embeddings": TIED_NAME not in tensors or torch.equal(tensors[TIED_NAME], tensors[EMBEDDING]),
        "qk_norm": q_norm is not None,
        "use_moe": moe,
    }
    if moe:
        fields["num_experts"] = _count(tensors, f"{mlp}experts.")
        fields["n_shared_experts"] = _count(tensors, f"{mlp}shared_experts.")
        fields["moe_intermediate_size"] = None
    try:
        return dataclasses.replace(base, **fields)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _count(names: Mapping[str, Tensor], prefix: str) -> int:
    """One more than the highest number that follows a prefix in names."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return 1 + max((int(match[1]) for name in names if (match := pattern.match(name))), default=-1)
