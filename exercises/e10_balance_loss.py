"""How unevenly a batch was routed."""

import torch
from torch import Tensor


def balance_loss(logits: Tensor, k: int) -> Tensor:
    """sum_i f_i P_i of (N, E) logits: 1 when even. f has no gradient, P has."""
    raise NotImplementedError
