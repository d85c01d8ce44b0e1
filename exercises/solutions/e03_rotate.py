"""Turn a query by its position."""

import torch
from torch import Tensor


def rotate(x: Tensor, position: int, base: float) -> Tensor:
    """x (d_h,) at a position, as Llama has it: pair i is (x[i], x[i + d_h / 2]), its frequency base ** (-2i / d_h)."""
    half = len(x) // 2
    angles = position * base ** (-torch.arange(half, dtype=x.dtype) / half)
    first, second = x[:half], x[half:]
    return torch.cat((first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()))
