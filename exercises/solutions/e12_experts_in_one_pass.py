"""Run experts on the tokens that chose them, each expert once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def run_experts(tokens: Tensor, chosen: Tensor, experts: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """tokens (N, d), chosen (N, k) int64 -> outputs (N, k, d). Each expert is called once, with all of its tokens.

    Sort the choices by expert, cut them into one piece an expert, and bring the outputs back into their order.
    """
    order = chosen.flatten().argsort(stable=True)
    rows = chosen.flatten().bincount(minlength=len(experts)).tolist()
    pieces = tokens[order // chosen.shape[1]].split(rows)
    outputs = torch.cat([expert(piece) for expert, piece in zip(experts, pieces, strict=True)])
    return outputs[order.argsort()].unflatten(0, chosen.shape)
