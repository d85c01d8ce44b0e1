"""RMSNorm and its gradient, without autograd."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain, over the last dimension. (N, d) -> (N, d)"""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


def rms_norm_gradient(x: Tensor, gain: Tensor, eps: float, incoming: Tensor) -> Tensor:
    """The gradient of the loss by x, given `incoming` (N, d), its gradient by the output."""
    r = (x.square().mean(-1, keepdim=True) + eps).sqrt()
    y, v = x / r, gain * incoming
    return (v - y * (v * y).mean(-1, keepdim=True)) / r
