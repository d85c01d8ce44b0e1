"""Routed SwiGLU experts: on a CPU one after another, on a GPU by grouped products.

Grouped products write every intermediate of all experts to memory before the next step reads it; on a CPU, where a
grouped product is a loop over the groups anyway, one whole expert at a time keeps its rows in the caches.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.model.kernels.matmul import matmul
from minimind.model.moe import Experts


class CpuExperts(Experts):
    """`Experts`, one whole expert at a time."""

    def compute(self, rows: Tensor, rows_per_expert: list[int]) -> Tensor:
        """As `Experts.compute`."""
        gate, up = self.gate_up_proj.chunk(2, dim=1)
        return cpu_experts(rows, rows_per_expert, gate, up, self.down_proj)


class GroupedExperts(Experts):
    """`Experts` by torch's grouped product, where it takes these weights: the host does not wait for the routing."""

    def forward(self, tokens: Tensor, experts: Tensor) -> Tensor:
        """As `Experts.forward`."""
        device, gate_up, down = tokens.device.type, self.gate_up_proj.mT, self.down_proj.mT
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            tokens, gate_up, down = (tensor.to(dtype) for tensor in (tokens, gate_up, down))
        # torch has it in these dtypes (a trace in bfloat16 only), for rows aligned to 16 bytes.
        known = (torch.bfloat16,) if torch.compiler.is_compiling() else (torch.bfloat16, torch.float16, torch.float32)
        is_aligned = not any(size * tokens.element_size() % 16 for size in down.shape[1:])
        if tokens.dtype not in known or not is_aligned or not hasattr(F, "grouped_mm"):
            return super().forward(tokens, experts)
        sorted_experts, order = experts.flatten().sort(stable=True)
        every_expert = torch.arange(len(down), device=experts.device)
        ends = torch.searchsorted(sorted_experts, every_expert, right=True, out_int32=True)
        gate, up = F.grouped_mm(tokens.index_select(0, order // experts.shape[1]), gate_up, offs=ends).chunk(2, dim=-1)
        outputs = F.grouped_mm(F.silu(gate) * up, down, offs=ends)
        return outputs.index_select(0, order.argsort()).unflatten(0, experts.shape)


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
