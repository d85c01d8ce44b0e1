"""Mixture of experts in place of the feed-forward: a router, routed SwiGLU experts, shared and residual experts.

The reference that every backend is measured by, and the source module that DeepSpeed's AutoEP takes over: `gate` is a
linear child, `experts` holds fused 3-D weights, `shared_experts` is one module. Refuses to know of ranks and losses.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.model.config import ModelConfig
from minimind.model.kernels.experts import cpu_experts, takes_cpu_experts
from minimind.model.kernels.grouped_mm import grouped_linear
from minimind.model.layers import BiasedLinear, FeedForward, Linear, fill_normal, residual_std
from minimind.model.router import BIAS_NAME, Router, route


class Experts(nn.Module):
    """The routed experts, fused: `gate_up_proj` (E, 2 * I, hidden_size), gate first; `down_proj` (E, hidden_size, I)"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        num_experts, size = config.num_experts, config.expert_feed_forward_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * size, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, config.hidden_size, size))
        fill_normal(self.gate_up_proj, config.initializer_range)
        fill_normal(self.down_proj, residual_std(config))

    def forward(self, tokens: Tensor, order: Tensor, inverse: Tensor, ends: Tensor) -> Tensor:
        """(N, hidden_size) tokens -> (N * K, hidden_size), one expert's rows behind the other's.

        `order` (N * K,): which choice (token by token, K each) each row is; `inverse`: which row each choice is; `ends`
        (E,) int32: where each expert's rows end; an expert without rows ends where the one before does.
        """
        if takes_cpu_experts(tokens):
            sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
            return cpu_experts(tokens, order, inverse, sizes, self.gate_up_proj, self.down_proj)
        rows = _Dispatch.apply(tokens, order, inverse, order.numel() // tokens.shape[0])
        gate, up = grouped_linear(rows, self.gate_up_proj, ends).chunk(2, dim=-1)
        return grouped_linear(F.silu(gate) * up, self.down_proj, ends)


class MoEFeedForward(nn.Module):
    """sum_k weight_k * expert_k(x) over a token's chosen experts, plus the shared experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = Linear(config.hidden_size, config.num_experts, config.initializer_range)
        self.experts = Experts(config)
        shared_size = config.n_shared_experts * config.expert_feed_forward_size
        self.shared_experts = FeedForward(config, shared_size) if shared_size else None
        bias = torch.zeros(config.num_experts) if config.router_bias_update_rate else None
        self.register_buffer(BIAS_NAME, bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, hidden_size) -> the same shape."""
        tokens = hidden_states.flatten(0, -2)  # (N, hidden_size)
        weights, experts = route(self.gate(tokens), self.config, getattr(self, BIAS_NAME))  # (N, K)
        sorted_experts, order = experts.flatten().sort(stable=True)  # (N * K,)
        every_expert = torch.arange(self.config.num_experts, device=experts.device)
        ends = torch.searchsorted(sorted_experts, every_expert, right=True, out_int32=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        outputs = self.experts(tokens, order, inverse, ends)
        outputs = _Combine.apply(outputs, order, inverse).unflatten(0, experts.shape)  # (N, K, hidden_size)
        mixed = (outputs * weights.unsqueeze(-1).to(outputs.dtype)).sum(dim=1).view_as(hidden_states)
        return mixed if self.shared_experts is None else mixed + self.shared_experts(hidden_states)

    @property
    def router(self) -> Router:
        """Where this layer's logits and selection bias are."""
        return Router(self.gate, self)

    def _apply(self, fn: Callable, recurse: bool = True) -> "MoEFeedForward":
        # A cast of the model would round the bias to bfloat16, where the small steps that move it are lost.
        exact = getattr(self, BIAS_NAME)
        super()._apply(fn, recurse)
        if exact is not None:
            moved = getattr(self, BIAS_NAME)
            setattr(self, BIAS_NAME, moved.float() if exact.is_meta else exact.to(moved.device))
        return self


class ResidualFeedForward(nn.Module):
    """A feed-forward that every token visits, and the two weights, summing to 1, by which a token mixes the experts'
    output with it: residual experts (DeepSpeed-MoE, arXiv 2201.05596). Whoever runs the experts, this stays here."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mlp = FeedForward(config, config.expert_feed_forward_size)
        self.coefficient = BiasedLinear(config.hidden_size, 2, config.initializer_range)

    def forward(self, hidden_states: Tensor, mixed: Tensor) -> Tensor:
        """(..., hidden_size) what the experts read, and what they gave -> the same shape."""
        experts, own = self.coefficient(hidden_states).softmax(dim=-1, dtype=torch.float32).to(mixed.dtype).split(1, -1)
        return mixed * experts + self.mlp(hidden_states) * own


class _Dispatch(torch.autograd.Function):
    """Rows of (N, hidden_size) tokens, each K times, in the order of their experts: (N * K, hidden_size).

    The gradient of a gather would be a scatter that adds (slow, and on a GPU in no fixed order); as every token is
    taken K times, it is a gather and a sum.
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


class _Combine(torch.autograd.Function):
    """The experts' outputs back in the order of the tokens; its gradient is the way there."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return outputs.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grad_outputs[0].index_select(0, order), None, None
