"""Causal attention with grouped heads, written out."""

import torch
from torch import Tensor


def attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """(H, T, d_h), (H_kv, T, d_h), (H_kv, T, d_h) -> (H, T, d_h). Query head j uses key/value head j * H_kv // H.

    Not with F.scaled_dot_product_attention.
    """
    raise NotImplementedError
