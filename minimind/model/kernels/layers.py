"""RMSNorm and the end of a SwiGLU in training on a CPU: little is kept for the backward, what is cheap is repeated.

torch computes RMSNorm there in six steps and keeps two float32 tensors as large as the input; here the input and one
number a row are kept. Of a SwiGLU autograd keeps silu(gate) and the product with up beside gate and up; here only the
latter. Together that is half of what a block keeps in 16 bit. Refuses to know what is normed or multiplied.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.model.kernels.matmul import linear, product, weight_gradient

# Elements of the rows that are normed at a time, for each thread: the steps after the first find them in the caches.
_CHUNK = 2**17


def is_recomputed(x: Tensor) -> bool:
    """Whether these layers are to be computed here: somebody will ask for gradients, and no compiler sees to memory."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(..., size), (size,) -> (..., size): `F.rms_norm` over the last dimension, in float32 with one rounding."""
    return _RMSNorm.apply(x, weight, eps)


def gated_linear(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """silu(gate) * up, both (..., in), times the transpose of (out, in): (..., out). In autocast's dtype where on."""
    if not torch.is_autocast_enabled("cpu"):
        return _GatedLinear.apply(gate, up, weight)
    dtype = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        return _GatedLinear.apply(gate.to(dtype), up.to(dtype), weight.to(dtype))


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunk_rows(x: Tensor) -> int:
    return max(1, _CHUNK * torch.get_num_threads() // max(1, x.shape[-1]))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed = torch.empty_like(x, memory_format=torch.contiguous_format)
        rows, targets = x.reshape(-1, x.shape[-1]), normed.view(-1, x.shape[-1])
        scales = torch.empty(len(rows), 1, dtype=_wide_dtype(x))
        size = _chunk_rows(x)
        for part, target, scale in zip(rows.split(size), targets.split(size), scales.split(size), strict=True):
            wide = part.to(scales.dtype)
            # A norm reads the rows once, a mean of squares writes and reads as much again.
            torch.linalg.vector_norm(wide, dim=-1, keepdim=True, out=scale)
            scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
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
        size = _chunk_rows(x)
        parts = (tensor.split(size) for tensor in (rows, grads, scales, x_grad.view(-1, width)))
        for part, grad, scale, target in zip(*parts, strict=True):
            normed, wide = part * scale, grad.to(scales.dtype)
            by_weight = wide * normed
            weight_grad += by_weight.sum(dim=0)
            shared = (by_weight @ factors).div_(width).unsqueeze(-1)
            target.copy_(normed.mul_(shared).neg_().addcmul_(wide, factors).mul_(scale))
        return x_grad, weight_grad.to(weight.dtype), None


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return linear(F.silu(gate).mul_(up), weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,) = grad_outputs
        gate, up, weight = ctx.saved_tensors
        active = F.silu(gate)
        weight_grad = weight_gradient(grad, active * up) if ctx.needs_input_grad[2] else None
        mixed_grad = product(grad.flatten(0, -2), weight).view_as(gate)
        active_grad = mixed_grad * up
        up_grad = mixed_grad.mul_(active)
        del active  # three tensors of this width stand in memory at once, beside gate and up, and no fourth
        return torch.ops.aten.silu_backward(active_grad, gate), up_grad, weight_grad
