"""Routed SwiGLU experts on a CPU, one after the other, each whole while its rows are in the caches.

Grouped products write every intermediate of all experts to memory before the next step reads it; on a CPU, where a
grouped product is a loop over the groups anyway, that is what they lose to a dense block. Refuses to know of routing.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.model.products import product, write_product


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
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        tokens, gate_up, down = tokens.to(dtype), gate_up.to(dtype), down.to(dtype)
    return _CpuExperts.apply(tokens, order, inverse, sizes, gate_up, down)


class _CpuExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, order: Tensor, inverse: Tensor, sizes: list[int], gate_up: Tensor, down: Tensor
    ) -> Tensor:
        outputs, kept, rows = [], [], order // max(1, order.numel() // max(1, tokens.shape[0]))
        with torch.autocast("cpu", enabled=False):
            for expert, own in enumerate(rows.split(sizes)):
                if not sizes[expert]:
                    continue
                inner = product(tokens.index_select(0, own), gate_up[expert].t())  # (m, 2 * I)
                gate, up = inner.chunk(2, dim=-1)
                outputs.append(product(F.silu(gate).mul_(up), down[expert].t()))
                kept.append(inner)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(tokens, rows, inverse, gate_up, down, *kept)
            ctx.sizes = sizes
        return torch.cat(outputs) if outputs else tokens.new_zeros(0, tokens.shape[1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        tokens, rows, inverse, gate_up, down, *kept = ctx.saved_tensors
        need_tokens, _, _, _, need_gate_up, need_down = ctx.needs_input_grad
        gate_up_grad = torch.empty_like(gate_up) if need_gate_up else None
        down_grad = torch.empty_like(down) if need_down else None
        pieces, inners = [], iter(kept)
        groups = zip(rows.split(ctx.sizes), grad_outputs[0].split(ctx.sizes), strict=True)
        with torch.autocast("cpu", enabled=False):
            for expert, (own, grad) in enumerate(groups):
                if not ctx.sizes[expert]:
                    for whole in (gate_up_grad, down_grad):
                        if whole is not None:
                            whole[expert].zero_()
                    continue
                gate, up = next(inners).chunk(2, dim=-1)
                active = F.silu(gate)
                if down_grad is not None:
                    write_product(down_grad[expert], grad.t(), active * up)
                mixed_grad = product(grad, down[expert])  # (m, I)
                gate_grad = torch.ops.aten.silu_backward(mixed_grad * up, gate)
                inner_grad = torch.cat((gate_grad, mixed_grad.mul_(active)), dim=-1)
                if gate_up_grad is not None:
                    write_product(gate_up_grad[expert], inner_grad.t(), tokens.index_select(0, own))
                if need_tokens:
                    pieces.append(product(inner_grad, gate_up[expert]))
        tokens_grad = None
        if need_tokens:
            tokens_grad = torch.zeros_like(tokens)
            if pieces:  # all rows of a token, added up by a gather and a sum
                tokens_grad = torch.cat(pieces).index_select(0, inverse).unflatten(0, (len(tokens), -1)).sum(dim=1)
        return tokens_grad, None, None, None, gate_up_grad, down_grad
