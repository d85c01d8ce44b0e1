"""One product for many matrices: groups of rows, each times its own matrix, by torch's grouped kernel where it fits.

Refuses to know what the groups are; experts are the only use so far.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.model.kernels.matmul import is_better_widened, product


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Each group of `rows` (M, in) times the transpose of its own matrix of `weight` (E, out, in): (M, out).

    `ends` (E,) int32: where each group ends; an empty one ends where the one before does, and its matrix gets a zero
    gradient. Computes in autocast's dtype where that is on.
    """
    device = rows.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        rows, weight = rows.to(dtype), weight.to(dtype)
    # A trace knows torch's kernel in bfloat16 only, and cannot follow the loop that stands in for it.
    is_traceable = rows.dtype == torch.bfloat16 and _fits_kernel(rows, weight)
    if is_better_widened(rows) or (torch.compiler.is_compiling() and not is_traceable):
        return _opaque_linear(rows, weight, ends)
    return _multiply(rows, weight, ends)


def _multiply(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if _fits_kernel(rows, weight):
        return F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)
    groups = zip(rows.split(_sizes(ends)), weight.unbind(), strict=True)
    return torch.cat([group @ matrix.t() for group, matrix in groups])


def _fits_kernel(rows: Tensor, weight: Tensor) -> bool:
    """Whether torch has a grouped product that takes these: a type it knows, every row aligned to 16 bytes."""
    if not hasattr(F, "grouped_mm"):
        return False
    aligned = all(size * rows.element_size() % 16 == 0 for size in weight.shape[1:])
    return aligned and rows.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _sizes(ends: Tensor) -> list[int]:
    return ends.diff(prepend=ends.new_zeros(1)).tolist()


@torch.library.custom_op("minimind::grouped_linear", mutates_args=())
def _opaque_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """As `grouped_linear`, one operation to a trace; what it keeps for the backward pass is as wide as its inputs."""
    if not is_better_widened(rows):
        return _multiply(rows, weight, ends)
    groups = zip(rows.split(_sizes(ends)), weight.unbind(), strict=True)
    return torch.cat([product(group, matrix.t()) for group, matrix in groups])


@torch.library.custom_op("minimind::grouped_outer", mutates_args=())
def _opaque_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """The sum of left (M, out) times right (M, in) over each group's rows: (E, out, in)."""
    groups = zip(left.split(_sizes(ends)), right.split(_sizes(ends)), strict=True)
    return torch.stack([product(a.t(), b) for a, b in groups])


@_opaque_linear.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@_opaque_outer.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    rows, weight, ends = ctx.saved_tensors
    return _opaque_linear(grad, weight.transpose(-2, -1), ends), _opaque_outer(grad, rows, ends), None


_opaque_linear.register_autograd(_backward, setup_context=_save_for_backward)
