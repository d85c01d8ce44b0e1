"""Turn a query by its position."""

import torch
from torch import Tensor


def rotate(x: Tensor, position: int, base: float) -> Tensor:
    """x (d_h,) at a position, as Llama has it: pair i is (x[i], x[i + d_h / 2]), its frequency base ** (-2i / d_h)."""
    raise NotImplementedError
