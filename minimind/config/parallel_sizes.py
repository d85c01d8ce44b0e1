"""Ranks that share each sequence (`sp_size`) or each layer (`tp_size`), and what is left of them for data.

What the groups are and who is in them: `minimind.parallel.mesh`.
"""

import math
from typing import Any

from minimind.config.overlaps import Overlaps
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import RunConfig, TrainConfig
from minimind.config.tensor_parallel import possible_tp_sizes, take_tensor_parallel
from minimind.errors import UserError
from minimind.model.config import ModelConfig
from minimind.schema import check_fields

SEQUENCE_KEY = "sequence_parallel_size"
"""DeepSpeed's JSON key of `sp_size`; it does not reach DeepSpeed, see `minimind.parallel.mesh`."""


def take_sizes(overlaps: Overlaps, run: RunConfig, ds: dict[str, Any], world_size: int) -> dict[str, int]:
    """`sp_size` and `tp_size` as the run and the JSON say them; the JSON's key of the first is taken out.

    Raises:
        UserError: they do not divide the ranks, with the sizes that do.
    """
    sp_size = overlaps.take("sp_size", run.train.sp_size, ds, SEQUENCE_KEY)
    ds.pop(SEQUENCE_KEY, None)
    sizes = {"sp_size": sp_size or 1, "tp_size": take_tensor_parallel(overlaps, run, ds)}
    sizes = check_fields(TrainConfig, sizes, "DeepSpeed config")
    sp_size, tp_size = sizes["sp_size"], sizes["tp_size"]
    if world_size % tp_size:
        possible = [str(size) for size in possible_tp_sizes(run.model) if world_size % size == 0]
        raise UserError(f"tp_size: {tp_size} does not divide {world_size} ranks; possible: {', '.join(possible)}")
    if world_size // tp_size % sp_size:
        raise UserError(
            f"sp_size: {sp_size} does not divide {world_size // tp_size} ranks; possible: "
            f"{_possible(run, tp_size, world_size)}"
        )
    return sizes


def check_sequence(resolved: ResolvedRun) -> None:
    """Refuse what ranks that share sequences cannot do.

    Raises:
        UserError: naming what can be done instead.
    """
    train, model, sp_size = resolved.train, resolved.model, resolved.train.sp_size
    if sp_size == 1:
        return
    possible = _possible(resolved.run, train.tp_size, resolved.world_size)
    if resolved.data.seq_len % sp_size:
        raise UserError(f"sp_size: {sp_size} does not divide seq_len {resolved.data.seq_len}; possible: {possible}")
    if not _shares_heads(model, sp_size, train.tp_size):
        raise UserError(
            f"sp_size: {sp_size} ranks cannot share {model.num_attention_heads} query heads that read "
            f"{model.num_key_value_heads} key-value heads; possible: {possible}"
        )
    if model.use_moe and model.router_aux_loss_coef and (model.seq_aux or model.aux_loss_scope == "micro"):
        name, value = ("seq_aux", True) if model.seq_aux else ("aux_loss_scope", "micro")
        raise UserError(
            f"{name}: {value} balances the experts of whole rows, which {sp_size} ranks share; use --no-seq-aux "
            "--aux-loss-scope global, or --sp-size 1"
        )
    if train.moe_drop_tokens:
        raise UserError(
            f"moe_drop_tokens: an expert's capacity counts whole rows, which {sp_size} ranks share; leave it out, or "
            "use --sp-size 1"
        )


def _shares_heads(model: ModelConfig, sp_size: int, tp_size: int) -> bool:
    """Whether each rank gets as many query heads, with the key-value heads that they read (repeated if need be), out of
    those that its tensor group leaves it."""
    heads, key_heads = model.num_attention_heads // tp_size, model.num_key_value_heads // tp_size
    return key_heads > 0 and heads % math.lcm(key_heads, sp_size) == 0


def _possible(run: RunConfig, tp_size: int, world_size: int) -> str:
    """The sizes of sequence groups beside tensor groups of this size."""
    num_ranks = world_size // tp_size
    fits = [
        size
        for size in range(1, num_ranks + 1)
        if num_ranks % size == 0 and run.data.seq_len % size == 0 and _shares_heads(run.model, size, tp_size)
    ]
    return ", ".join(map(str, fits))
