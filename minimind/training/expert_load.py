"""What the experts of a step were given: counted on the device, summed over ranks, put into figures for the log.

Counts come from one forward, so a recomputation under activation checkpointing adds nothing, and every step begins at
zero. Knows nothing of backends and of the loop.
"""

import math
from typing import Any

import torch

from minimind.model.transformer import CausalLMOutput


def count_choices(output: CausalLMOutput, before: torch.Tensor | None) -> torch.Tensor:
    """The counts `before` and those of this forward, (num_moe_layers, num_experts + 1) int64: how often each expert was
    chosen, and in the last column how many of these choices found no room."""
    assert output.expert_load is not None, "a dense model has nothing to count"
    load = output.expert_load
    lost = load.new_zeros(load.shape[0]) if output.dropped is None else output.dropped
    counts = torch.cat([load, lost.unsqueeze(1)], dim=1)
    return counts if before is None else before + counts


def load_of(counts: torch.Tensor) -> torch.Tensor:
    """The (num_moe_layers, num_experts) part of `count_choices`."""
    return counts[:, :-1]


def summarize_load(counts: torch.Tensor) -> dict[str, Any]:
    """Figures of one step, from `count_choices` summed over its micro-batches and ranks.

    `expert_load`: for each MoE layer, how many tokens chose each expert. `expert_balance`: for each layer the least and
    the most of these, the entropy of the load as a share of its maximum (1: all alike, 0: one expert has all), and the
    share of the choices that found no room. `load_entropy` and `dropped_share`: the means of the last two.
    """
    load, dropped = load_of(counts).double().cpu(), counts[:, -1].double().cpu()
    total = load.sum(dim=1)  # (num_moe_layers,)
    shares = load / total.unsqueeze(1)
    most = math.log(load.shape[1]) or 1.0
    entropy = torch.special.entr(shares).sum(dim=1) / most if load.shape[1] > 1 else torch.ones_like(total)
    lost = dropped / total
    return {
        "load_entropy": float(entropy.mean()),
        "dropped_share": float(lost.mean()),
        "expert_load": load.long().tolist(),
        "expert_balance": {
            "min": load.amin(dim=1).long().tolist(),
            "max": load.amax(dim=1).long().tolist(),
            "entropy": entropy.tolist(),
            "dropped": lost.tolist(),
        },
    }
