"""Matrix products on a CPU, in the way that is fastest on this processor.

In float32 torch takes MKL, which leaves half of an AMD processor with AVX512 idle; oneDNN, which comes with torch, does
not. In 16 bit torch takes oneDNN; a processor that oneDNN has no 16-bit product for (AVX2 alone, as in most laptops)
is left with plain loops, up to 75 times slower than float32: there the numbers are widened to float32, multiplied,
and rounded. Refuses to know what is multiplied.
"""

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Multiplications from which on oneDNN is worth its start: measured on Zen 5, equal to MKL at 16 x 256 x 256.
_SMALLEST = 2**21

# Rows from which on widening both matrices is worth it: for fewer, reading a transposed matrix once in 16 bit is
# faster (Zen 3, matrices of 768 x 768 to 6400 x 768). One that is not transposed, as gradients meet it, is slow at one.
_FEWEST_ROWS = 8


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """(..., in) times the transpose of (out, in): (..., out). As `F.linear`, sums rounded in another order."""
    is_trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    fewest = 1 if is_trained else _FEWEST_ROWS
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        if not is_better_widened(x, dtype, fewest=fewest):
            return F.linear(x, weight)
        with torch.autocast("cpu", enabled=False):
            return _Linear.apply(x.to(dtype), weight.to(dtype))
    if is_better_widened(x, fewest=fewest) or is_better_by_onednn(x, weight):
        return _Linear.apply(x, weight)
    return F.linear(x, weight)


def product(left: Tensor, right: Tensor) -> Tensor:
    """(m, k) times (k, n): (m, n). No gradient is kept."""
    if is_better_widened(left, fewest=1 if right.stride(-1) == 1 else _FEWEST_ROWS):
        return (left.float() @ right.float()).to(left.dtype)
    return onednn_product(left, right.t()) if is_better_by_onednn(left, right) else left @ right


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of `linear`'s matrix (out, in) from that of its outputs (..., out) and from its inputs (..., in)."""
    if is_better_widened(grad, fewest=1) or is_better_by_onednn(grad, x):
        return _multiply_columns(grad, x)
    return grad.flatten(0, -2).t() @ x.flatten(0, -2)


def write_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    """Put (m, k) times (k, n) into `target` (m, n). No gradient is kept."""
    if is_better_widened(left) or is_better_by_onednn(left, right):
        target.copy_(product(left, right))
    else:
        torch.mm(left, right, out=target)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add (m, k) times (k, n) to the float32 `total` (m, n) in place. No gradient is kept."""
    if is_better_widened(left) or (left.dtype == torch.float32 and not is_better_by_onednn(left, right)):
        total.addmm_(left.float(), right.float())
    else:
        total += product(left, right)


def is_better_widened(x: Tensor, dtype: torch.dtype | None = None, fewest: int = _FEWEST_ROWS) -> bool:
    """Whether rows (..., k), `fewest` or more, are to be multiplied in float32: their type (or `dtype`) is 16 bit."""
    dtype = dtype or x.dtype
    if dtype not in (torch.bfloat16, torch.float16) or x.device.type != "cpu":
        return False
    return x.numel() >= fewest * max(1, x.shape[-1]) and not multiplies(dtype)


@torch.compiler.assume_constant_result
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor has fast matrix products in a 16-bit `dtype`; without oneDNN nothing is known: yes."""
    return _ask_onednn(dtype)


@functools.cache
def _ask_onednn(dtype: torch.dtype) -> bool:
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    return not (has_onednn() and hasattr(torch.ops.mkldnn, name)) or bool(getattr(torch.ops.mkldnn, name)())


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
    """`F.linear` by the way that is chosen here, with both gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        x_grad = _multiply(grad, weight.t()) if ctx.needs_input_grad[0] else None
        return x_grad, _multiply_columns(grad, x) if ctx.needs_input_grad[1] else None


def _multiply_columns(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of a matrix (out, in) from that of its outputs (..., out) and from its inputs (..., in)."""
    columns = x.flatten(0, -2).t()
    if x.dtype == torch.float32:  # oneDNN multiplies by rows
        columns = columns.contiguous()
    return _multiply(grad.flatten(0, -2).t(), columns)


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """(..., k) times the transpose of (n, k): (..., n)."""
    if left.dtype == torch.float32:
        return onednn_product(left, right)
    return F.linear(left.float(), right.float()).to(left.dtype)
