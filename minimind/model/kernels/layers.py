"""RMSNorm and SwiGLU in training on a CPU: less is kept for the backward pass, what is cheap is recomputed.

torch computes RMSNorm there in six steps and keeps two float32 tensors as large as the input; here the input and one
number a row are kept. Of a SwiGLU autograd keeps silu(gate) beside gate, up and their product; here it is recomputed.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.model.layers import FeedForward, RMSNorm

# Elements of the rows that are normalized at a time, for each thread: the steps after the first hit the caches.
_CHUNK = 2**17


def _is_trained_here() -> bool:
    """Gradients are needed, and no compiler plans what is kept for them."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


class FastRMSNorm(RMSNorm):
    """`RMSNorm` that keeps its input and one number a row."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> the same shape and dtype."""
        if not _is_trained_here():
            return super().forward(x)
        return _RMSNorm.apply(x, self.weight.to(x.dtype), self.eps)


class FastFeedForward(FeedForward):
    """`FeedForward` that recomputes silu(gate) in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden_size) -> the same shape."""
        if not _is_trained_here():
            return super().forward(x)
        return self.down_proj(_SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


class _RMSNorm(torch.autograd.Function):
    """`F.rms_norm` over the last dimension, in float32 (or float64) with one rounding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        width = x.shape[-1]
        normed = torch.empty_like(x, memory_format=torch.contiguous_format)
        rows, targets = x.reshape(-1, width), normed.view(-1, width)
        scales = rows.new_empty(len(rows), 1, dtype=torch.promote_types(x.dtype, torch.float32))
        size = _rows_per_chunk(width)
        for part, target, scale in zip(rows.split(size), targets.split(size), scales.split(size), strict=True):
            wide = part.to(scales.dtype)
            # A norm reads the rows once, a mean of squares writes and reads as much again.
            torch.linalg.vector_norm(wide, dim=-1, keepdim=True, out=scale)
            scale.square_().div_(width).add_(eps).rsqrt_()
            target.copy_((wide * scale).mul_(weight))
        ctx.save_for_backward(x, weight, scales)
        return normed

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scales = ctx.saved_tensors
        width = x.shape[-1]
        rows, grads = x.reshape(-1, width), grad_outputs[0].reshape(-1, width)
        x_grad = torch.empty_like(x, memory_format=torch.contiguous_format)
        factors = weight.to(scales.dtype)
        weight_grad = torch.zeros_like(factors)
        parts = (tensor.split(_rows_per_chunk(width)) for tensor in (rows, grads, scales, x_grad.view(-1, width)))
        for part, grad, scale, target in zip(*parts, strict=True):
            normed, wide = part * scale, grad.to(scales.dtype)
            by_weight = wide * normed
            weight_grad += by_weight.sum(dim=0)
            shared = (by_weight @ factors).div_(width).unsqueeze(-1)
            target.copy_(normed.mul_(shared).neg_().addcmul_(wide, factors).mul_(scale))
        return x_grad, weight_grad.to(weight.dtype), None


def _rows_per_chunk(width: int) -> int:
    return max(1, _CHUNK * torch.get_num_threads() // max(1, width))


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grad_outputs
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)
