"""Float32 matrix products on a CPU, by the library that is faster on this processor.

torch takes MKL for them, which leaves half of an AMD processor with AVX512 idle; oneDNN, which comes with torch and
does the same in 16 bit, does not. Refuses to know what is multiplied.
"""

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Multiplications from which on oneDNN is worth its start: measured on Zen 5, equal to MKL at 16 x 256 x 256.
_SMALLEST = 2**21


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """(..., in) times the transpose of (out, in): (..., out). As `F.linear`, sums rounded in another order."""
    return _Linear.apply(x, weight) if is_better_by_onednn(x, weight) else F.linear(x, weight)


def product(left: Tensor, right: Tensor) -> Tensor:
    """(m, k) times (k, n): (m, n). No gradient is kept."""
    return onednn_product(left, right.t()) if is_better_by_onednn(left, right) else left @ right


def write_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    """Put (m, k) times (k, n) into `target` (m, n). No gradient is kept."""
    if is_better_by_onednn(left, right):
        target.copy_(onednn_product(left, right.t()))
    else:
        torch.mm(left, right, out=target)


def is_better_by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `x` (..., in) times a matrix of `weight`'s size is to be computed by oneDNN."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() * max(weight.shape) >= _SMALLEST
        and is_onednn_faster()
        and not torch.is_autocast_enabled("cpu")
    )


@torch.compiler.assume_constant_result
def is_onednn_faster() -> bool:
    """Whether this processor multiplies float32 matrices faster by oneDNN than by what torch takes."""
    return _look_at_processor()


@functools.cache
def _look_at_processor() -> bool:
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available() or not has_onednn():
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


@functools.cache
def has_onednn() -> bool:
    """Whether this torch has oneDNN and lets its products be called."""
    names = ("_linear_pointwise", "_reorder_linear_weight")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


def onednn_product(left: Tensor, right: Tensor) -> Tensor:
    """(..., k) times the transpose of (n, k), which may be one of `pack`: (..., n). No gradient is kept."""
    if torch.compiler.is_compiling():
        return _traced_product(left, right)
    if left.numel() == 0:  # oneDNN has no product of nothing
        return left.new_zeros(*left.shape[:-1], right.shape[0])
    return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")


@torch.library.custom_op("minimind::onednn_product", mutates_args=())
def _traced_product(left: Tensor, right: Tensor) -> Tensor:
    """As `onednn_product`, for torch.compile, which would compile oneDNN's own name into something else."""
    return onednn_product(left, right)


@_traced_product.register_fake
def _(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(*left.shape[:-1], right.shape[0])


def pack(weight: Tensor) -> Tensor:
    """A matrix (n, k) as oneDNN reads it fastest, opaque to everything but `onednn_product`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, 1)


class _Linear(torch.autograd.Function):
    """`F.linear` by oneDNN, with both gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_product(x, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        x_grad = onednn_product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        weight_grad = None
        if ctx.needs_input_grad[1]:
            weight_grad = onednn_product(grad.flatten(0, -2).t(), x.flatten(0, -2).t().contiguous())
        return x_grad, weight_grad
