"""DeepSpeed settings of a model whose layers are split over ranks: the `tensor_parallel` block, and what is refused.

The block for AutoTP is written from the model's config, a rule for every weight; nothing is left to DeepSpeed's
detection, which takes no notice of QK-norm. What the engines do with it: `minimind.parallel.tensor_parallel`.
"""

import re
from collections.abc import Iterable
from typing import Any

from minimind.config.deepspeed_keys import AUTO
from minimind.config.overlaps import Overlaps
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import RunConfig
from minimind.errors import UserError
from minimind.model.config import ModelConfig
from minimind.model.tuning import trained_shapes
from minimind.schema import nearest

BLOCK = "tensor_parallel"

_FEED_FORWARDS = r"(mlp|mlp\.shared_experts|residual\.mlp)"
# Beside an AutoEP layer, AutoTP leaves the first words out of a name.
_LAYER = r"(model\.layers\.)?\d+\."
COLUMNS = rf"{_LAYER}(self_attn\.[qkv]_proj|{_FEED_FORWARDS}\.(gate|up)_proj)\.(weight|bias)$"
"""Cut by their outputs, dimension 0: heads, or inner features of a feed-forward."""
ROWS = rf"{_LAYER}(self_attn\.o_proj|{_FEED_FORWARDS}\.down_proj)\.weight$"
"""Cut by their inputs, dimension 1; the ranks' products are added up."""
SUMMED = rf"{_LAYER}self_attn\.[qk]_norm\.weight$"
"""Whole on every rank, and used on its own heads alone: its gradient is the sum over the ranks."""
WHOLE = rf"(model\.embed_tokens|lm_head|model\.norm|{_LAYER}(\w+_layernorm|mlp\.gate|residual\.coefficient))\.\w+$"
"""Whole on every rank, and used on whole rows: every rank has the whole gradient by itself."""

_FREE_KEYS = ("tp_overlap_comm",)
_UNUSED_KEYS = {
    "partition_config": "how each weight is cut is written from the model",
    "preset_model": "how each weight is cut is written from the model",
    "vocab_parallel_lm_head": "the output matrix stays whole: the loss reads it in chunks",
    "vocab_parallel_ce_backend": "the output matrix stays whole: the loss reads it in chunks",
    "tp": "tp_size and the ranks' groups are the run's",
    "dtype": "the precision is the run's",
    "injection_policy_tuple": "it is for inference",
    "keep_module_on_host": "it is for inference",
    "replace_with_kernel_inject": "it is for inference",
    "kernel_inject": "it is for inference",
}


def autotp_block(tp_size: int, trained: Iterable[str]) -> dict[str, Any]:
    """The whole `tensor_parallel` section.

    Args:
        trained: names of the parameters that get a gradient.
    """
    summed = [rf"{re.escape(name)}$" for name in trained if re.match(SUMMED, name)]
    # Strict: a matrix that no rule names is an error, and no guess.
    rules = [
        {"patterns": [COLUMNS], "partition_type": "column"},
        {"patterns": [ROWS], "partition_type": "row"},
        {"patterns": summed, "partition_type": "skip", "grad_allreduce": True},
        {"patterns": [WHOLE], "partition_type": "skip"},
    ]
    return {
        "autotp_size": tp_size,
        "vocab_parallel_lm_head": False,
        "partition_config": {"use_default_specs": False, "strict_mode": True, "layer_specs": rules},
    }


def cut_dimension(name: str) -> int | None:
    """The dimension along which the ranks of a tensor group share the parameter of this name; None: each has all."""
    if re.match(COLUMNS, name):
        return 0
    return 1 if re.match(ROWS, name) else None


def take_tensor_parallel(overlaps: Overlaps, run: RunConfig, ds: dict[str, Any]) -> int:
    """`tp_size` as the run and the JSON's `tensor_parallel` say it.

    Raises:
        UserError: a key of the block that is unknown or not used.
    """
    block = ds.get(BLOCK, {})
    written = autotp_block(1, trained_shapes(run.model, run.train.lora, run.train.freeze))
    for key, value in block.items():
        if key in _UNUSED_KEYS and value not in (AUTO, written.get(key)):  # what a run has written can be given again
            raise UserError(f"DeepSpeed config: {BLOCK}.{key} is not used: {_UNUSED_KEYS[key]}; remove it")
        if key not in ("autotp_size", *_FREE_KEYS, *_UNUSED_KEYS):
            known = ["autotp_size", *_FREE_KEYS]
            raise UserError(f"DeepSpeed config: {BLOCK}: unknown field '{key}'{nearest(key, known)}")
    if block.get("autotp_size") == 0:
        block = {**block, "autotp_size": 1}  # DeepSpeed's word for none
    return overlaps.take("tp_size", run.train.tp_size, block, "autotp_size", f"{BLOCK}.") or 1


def write_tensor_parallel(ds: dict[str, Any], tp_size: int, trained: Iterable[str]) -> None:
    """Put the resolved block into the copy of the JSON that DeepSpeed gets, or take it out."""
    block = ds.pop(BLOCK, {})
    if tp_size > 1:
        free = {key: value for key, value in block.items() if key in _FREE_KEYS and value != AUTO}
        ds[BLOCK] = {**autotp_block(tp_size, trained), **free}


def possible_tp_sizes(config: ModelConfig) -> list[int]:
    """Over how many ranks a layer can be cut evenly: whole key-value heads, and equal parts of each feed-forward."""
    widths = [config.num_key_value_heads, config.num_attention_heads, config.feed_forward_size]
    if config.use_moe and config.n_shared_experts:
        widths.append(config.n_shared_experts * config.expert_feed_forward_size)
    return [size for size in range(1, config.num_key_value_heads + 1) if all(width % size == 0 for width in widths)]


def check_tensor_parallel(resolved: ResolvedRun) -> None:
    """Refuse, before anything is started, what a split of layers cannot do.

    Raises:
        UserError: naming the setting, its value and what to do.
    """
    train, model, size = resolved.train, resolved.model, resolved.train.tp_size
    if size == 1:
        return
    possible = possible_tp_sizes(model)
    if size not in possible:
        heads = f"{model.num_key_value_heads} key-value heads and feed-forwards of {model.feed_forward_size}"
        sizes = ", ".join(map(str, possible))
        raise UserError(f"tp_size: {size} ranks cannot share {heads} evenly; possible: {sizes}; or use --sp-size")
    if train.moe_backend == "deepspeed":
        raise UserError(f"moe_backend: deepspeed does not know tp_size {size}; use --moe-backend autoep, or --sp-size")
    if train.moe_backend == "autoep" and train.ep_size == 1:
        raise UserError(f"tp_size: {size} needs an ep_size above 1 beside experts: AutoEP shares them over all ranks")
    if train.moe_backend == "autoep" and (train.sp_size > 1 or resolved.zero.offloaded):
        other = f"sp_size {train.sp_size}" if train.sp_size > 1 else "offload"
        raise UserError(f"tp_size: {size} beside experts does not go with {other}; leave one out")
    zero = resolved.ds.get("zero_optimization", {})
    if resolved.zero.hpz_partition_size > 1 or zero.get("zero_quantized_gradients"):
        name = "zero_hpz_partition_size" if resolved.zero.hpz_partition_size > 1 else "zero_quantized_gradients"
        raise UserError(
            f"DeepSpeed config: zero_optimization.{name} takes neighbours for ranks with the same weights, and with "
            f"tp_size {size} they have others; remove it"
        )
    if train.lora is not None:
        raise UserError(f"tp_size: {size}: AutoTP would drop the adapters of lora_rank; use a ZeRO stage or --sp-size")
    if resolved.ds[BLOCK].get("tp_overlap_comm") and model.attention_bias:
        raise UserError(f"DeepSpeed config: {BLOCK}.tp_overlap_comm knows no attention_bias; remove it")
