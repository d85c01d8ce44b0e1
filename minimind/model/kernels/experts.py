"""Routed SwiGLU experts on a CPU, one after the other, each whole while its rows are in the caches.

Grouped products write every intermediate of all experts to memory before the next step reads it; on a CPU, where a
grouped product is a loop over the groups anyway, that is what they lose to a dense block. Refuses to know of routing.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.model.kernels.matmul import product, write_product


def takes_cpu_experts(tokens: Tensor) -> bool:
    """Whether `cpu_experts` is the way to run experts on these tokens."""
    return tokens.device.type == "cpu" and not torch.compiler.is_compiling()


def cpu_experts(
    tokens: Tensor, order: Tensor, inverse: Tensor, sizes: list[int], gate_up: Tensor, down: Tensor
) -> Tensor:
    """Outputs of the experts, (N * K, hidden_size), one expert's rows behind the other's.

    Args:
        tokens: (N, hidden_size).
        order: (N * K,), which choice of all (token by token) each row is; `inverse`: which row each choice is.
        sizes: rows of each expert. One without rows is not read, and its gradient is zero.
        gate_up: (E, 2 * I, hidden_size), gate first; `down` (E, hidden_size, I).

    Computes in autocast's dtype where that is on.
    """
    rows = order // max(1, order.numel() // max(1, tokens.shape[0]))
    return _CpuExperts.apply(*_cast(tokens), rows, inverse, sizes, *_cast(down, gate_up))


def cpu_experts_of_rows(rows: Tensor, sizes: list[int], gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Outputs of the experts for rows that stand one expert's behind the other's already: (M, hidden_size).

    Args:
        rows: (M, hidden_size).
        sizes: rows of each expert; those behind the last are nobody's, and become zeros.
        gate: (E, I, hidden_size), as `up`; `down` (E, hidden_size, I).

    Computes in autocast's dtype where that is on.
    """
    return _CpuExperts.apply(*_cast(rows), None, None, sizes, *_cast(down, gate, up))


def _cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    if not torch.is_autocast_enabled("cpu"):
        return tensors
    dtype = torch.get_autocast_dtype("cpu")
    return tuple(tensor.to(dtype) for tensor in tensors)


def _inputs(tokens: Tensor, rows: Tensor | None, sizes: list[int]) -> Iterator[tuple[int, Tensor]]:
    """Every expert that has rows, and those rows."""
    parts = tokens[: sum(sizes)].split(sizes) if rows is None else rows.split(sizes)
    for expert, part in enumerate(parts):
        if sizes[expert]:
            yield expert, part if rows is None else tokens.index_select(0, part)


class _CpuExperts(torch.autograd.Function):
    """`rows`: which token each row is, None where the tokens are the rows. `into`: one matrix an expert, gate above up,
    or two."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        rows: Tensor | None,
        inverse: Tensor | None,
        sizes: list[int],
        down: Tensor,
        *into: Tensor,
    ) -> Tensor:
        outputs, kept = [], []
        with torch.autocast("cpu", enabled=False):
            for expert, own in _inputs(tokens, rows, sizes):
                inner = [product(own, matrix[expert].t()) for matrix in into]  # (m, 2 * I), or twice (m, I)
                gate, up = _halves(inner)
                outputs.append(product(F.silu(gate).mul_(up), down[expert].t()))
                kept += inner
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(tokens, rows, inverse, down, *into, *kept)
            ctx.sizes, ctx.num_into = sizes, len(into)
        nobodys = tokens.shape[0] - sum(sizes) if rows is None else 0
        return torch.cat([*outputs, tokens.new_zeros(nobodys, tokens.shape[1])])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        tokens, rows, inverse, down, *rest = ctx.saved_tensors
        into, inners = rest[: ctx.num_into], iter(rest[ctx.num_into :])
        need_tokens, _, _, _, *need_weights = ctx.needs_input_grad
        weights = zip((down, *into), need_weights, strict=True)
        down_grad, *into_grads = [torch.empty_like(weight) if needed else None for weight, needed in weights]
        for expert, size in enumerate(ctx.sizes):
            if not size:
                for whole in (down_grad, *into_grads):
                    if whole is not None:
                        whole[expert].zero_()
        pieces = []
        grads = _inputs(grad_outputs[0], None, ctx.sizes)
        with torch.autocast("cpu", enabled=False):
            for (expert, own), (_, grad) in zip(_inputs(tokens, rows, ctx.sizes), grads, strict=True):
                gate, up = _halves([next(inners) for _ in into])
                active = F.silu(gate)
                if down_grad is not None:
                    write_product(down_grad[expert], grad.t(), active * up)
                mixed_grad = product(grad, down[expert])  # (m, I)
                inner_grads = [torch.ops.aten.silu_backward(mixed_grad * up, gate), mixed_grad.mul_(active)]
                if len(into) == 1:
                    inner_grads = [torch.cat(inner_grads, dim=-1)]
                for into_grad, inner_grad in zip(into_grads, inner_grads, strict=True):
                    if into_grad is not None:
                        write_product(into_grad[expert], inner_grad.t(), own)
                if need_tokens:
                    first, *others = [product(g, matrix[expert]) for g, matrix in zip(inner_grads, into, strict=True)]
                    pieces.append(sum(others, start=first))
        tokens_grad = _gather_grad(tokens, inverse, pieces) if need_tokens else None
        return tokens_grad, None, None, None, down_grad, *into_grads


def _halves(inner: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(inner) if len(inner) == 2 else inner[0].chunk(2, dim=-1)


def _gather_grad(tokens: Tensor, inverse: Tensor | None, pieces: list[Tensor]) -> Tensor:
    """The gradient of the tokens from those of their rows, one expert's behind the other's."""
    if inverse is None:
        nobodys = tokens.shape[0] - sum(len(piece) for piece in pieces)
        return torch.cat([*pieces, tokens.new_zeros(nobodys, tokens.shape[1])])
    if not pieces:
        return torch.zeros_like(tokens)
    return torch.cat(pieces).index_select(0, inverse).unflatten(0, (len(tokens), -1)).sum(dim=1)
