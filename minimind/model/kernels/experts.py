"""Routed SwiGLU experts: on a CPU one after another, on a GPU by grouped products.

Grouped products write every intermediate of all experts to memory before the next step reads it; on a CPU, where a
grouped product is a loop over the groups anyway, one whole expert at a time keeps its rows in the caches.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.model.kernels.matmul import matmul
from minimind.model.moe import Experts


class CpuExperts(Experts):
    """`Experts`, one whole expert at a time."""

    @torch.compiler.disable
    def forward(self, tokens: Tensor, experts: Tensor) -> Tensor:
        """As `Experts.forward`."""
        order = experts.flatten().argsort(stable=True)
        rows_per_expert = experts.flatten().bincount(minlength=len(self.down_proj)).tolist()
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel()))
        rows = _Dispatch.apply(tokens, order, inverse, experts.shape[1])
        gate, up = self.gate_up_proj.chunk(2, dim=1)
        outputs = cpu_experts(rows, rows_per_expert, gate, up, self.down_proj)
        return _Permute.apply(outputs, inverse, order).unflatten(0, experts.shape)


class GroupedExperts(Experts):
    """`Experts` by torch's grouped product, where it takes these weights."""

    def forward(self, tokens: Tensor, experts: Tensor) -> Tensor:
        """As `Experts.forward`."""
        device, gate_up, down = tokens.device.type, self.gate_up_proj.mT, self.down_proj.mT
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            tokens, gate_up, down = (tensor.to(dtype) for tensor in (tokens, gate_up, down))
        if not _fits_grouped_mm(tokens.dtype, (gate_up, down)):
            return super().forward(tokens, experts)
        sorted_experts, order = experts.flatten().sort(stable=True)
        every_expert = torch.arange(len(self.down_proj), device=experts.device)
        ends = torch.searchsorted(sorted_experts, every_expert, right=True, out_int32=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        rows = _Dispatch.apply(tokens, order, inverse, experts.shape[1])
        gate, up = F.grouped_mm(rows, gate_up, offs=ends).chunk(2, dim=-1)
        outputs = F.grouped_mm(F.silu(gate) * up, down, offs=ends)
        return _Permute.apply(outputs, inverse, order).unflatten(0, experts.shape)


def _fits_grouped_mm(dtype: torch.dtype, weights: Sequence[Tensor]) -> bool:
    """Whether torch has a grouped product for these: a dtype it knows, every row aligned to 16 bytes."""
    sizes = (size for weight in weights for size in weight.shape[1:])
    if not hasattr(F, "grouped_mm") or any(size * dtype.itemsize % 16 for size in sizes):
        return False
    # A trace knows it in bfloat16 only.
    return dtype == torch.bfloat16 or (dtype in (torch.float32, torch.float16) and not torch.compiler.is_compiling())


def cpu_experts(rows: Tensor, sizes: list[int], gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Outputs of the experts for rows (M, hidden_size) that are sorted by expert: (M, hidden_size).

    Args:
        sizes: rows of each expert; trailing rows are padding and produce zeros. An expert without rows is not read, and
            its gradient is zero.
        gate: (E, I, hidden_size), as `up`; `down` (E, hidden_size, I).

    Computes in autocast's dtype where that is on.
    """
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        rows, gate, up, down = (tensor.to(dtype) for tensor in (rows, gate, up, down))
    return _CpuExperts.apply(rows, sizes, gate, up, down)


class _CpuExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        outputs, kept = torch.zeros_like(rows), []
        with torch.autocast("cpu", enabled=False):
            for expert, own, target in _split(sizes, rows, outputs):
                inner = [matmul(own, matrix[expert].t()) for matrix in (gate, up)]  # (m, I) each
                matmul(F.silu(inner[0]).mul_(inner[1]), down[expert].t(), out=target)
                kept += inner
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(rows, gate, up, down, *kept)
            ctx.sizes = sizes
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, gate, up, down, *kept = ctx.saved_tensors
        need_rows, _, *need_weights = ctx.needs_input_grad
        rows_grad = torch.zeros_like(rows)
        gate_grad, up_grad, down_grad = (
            torch.empty_like(weight) if needed else None
            for weight, needed in zip((gate, up, down), need_weights, strict=True)
        )
        for expert, size in enumerate(ctx.sizes):
            if not size:
                for weight_grad in (gate_grad, up_grad, down_grad):
                    if weight_grad is not None:
                        weight_grad[expert].zero_()
        inner = iter(kept)
        with torch.autocast("cpu", enabled=False):
            for expert, own, grad, own_grad in _split(ctx.sizes, rows, grad_outputs[0], rows_grad):
                own_gate, own_up = next(inner), next(inner)
                active = F.silu(own_gate)
                if down_grad is not None:
                    matmul(grad.t(), active * own_up, out=down_grad[expert])
                mixed_grad = matmul(grad, down[expert])  # (m, I)
                inner_grads = torch.ops.aten.silu_backward(mixed_grad * own_up, own_gate), mixed_grad.mul_(active)
                for weight_grad, inner_grad in zip((gate_grad, up_grad), inner_grads, strict=True):
                    if weight_grad is not None:
                        matmul(inner_grad.t(), own, out=weight_grad[expert])
                if need_rows:
                    matmul(inner_grads[0], gate[expert], out=own_grad)
                    own_grad += matmul(inner_grads[1], up[expert])
        return rows_grad if need_rows else None, None, gate_grad, up_grad, down_grad


def _split(sizes: list[int], *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """Each expert that has rows, and its rows of every tensor."""
    parts = zip(*(tensor[: sum(sizes)].split(sizes) for tensor in tensors), strict=True)
    return ((expert, *own) for expert, own in enumerate(parts) if sizes[expert])


class _Dispatch(torch.autograd.Function):
    """Rows of (N, hidden_size) tokens, each K times, sorted by expert: (N * K, hidden_size).

    The gradient of a gather would be a scatter that adds (slow, and on a GPU in no fixed order); as every token occurs
    K times, it is a gather and a sum.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return tokens.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        grad = grad_outputs[0].index_select(0, inverse).unflatten(0, (-1, ctx.top_k)).sum(dim=1)
        return grad, None, None, None


class _Permute(torch.autograd.Function):
    """Rows (M, hidden_size) in the order `places`, whose inverse permutation is `back`: the gradient is a gather."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return grad_outputs[0].index_select(0, ctx.saved_tensors[0]), None, None
