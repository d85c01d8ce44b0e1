"""How unevenly a batch was routed."""

import torch
from torch import Tensor


def balance_loss(logits: Tensor, k: int) -> Tensor:
    """sum_i f_i P_i of (N, E) logits: 1 when even. f has no gradient, P has."""
    scores = logits.softmax(-1)
    num_experts = logits.shape[-1]
    counts = torch.bincount(scores.topk(k).indices.flatten(), minlength=num_experts)
    return (num_experts * counts / counts.sum() * scores.mean(0)).sum()
