"""Causal attention with grouped heads, written out."""

import torch
from torch import Tensor


def attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """(H, T, d_h), (H_kv, T, d_h), (H_kv, T, d_h) -> (H, T, d_h). Query head j uses key/value head j * H_kv // H.

    Not with F.scaled_dot_product_attention.
    """
    group = len(queries) // len(keys)
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    scores = queries @ keys.mT / queries.shape[-1] ** 0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, float("-inf")).softmax(-1) @ values
