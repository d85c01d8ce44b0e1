"""RMSNorm and its gradient, without autograd."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain, over the last dimension. (N, d) -> (N, d)"""
    raise NotImplementedError


def rms_norm_gradient(x: Tensor, gain: Tensor, eps: float, incoming: Tensor) -> Tensor:
    """The gradient of the loss by x, given `incoming` (N, d), its gradient by the output."""
    raise NotImplementedError
