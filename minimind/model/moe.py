"""Mixture of experts in place of the feed-forward: a router, routed SwiGLU experts, shared and residual experts.

The reference that every backend is measured by, and the source module that DeepSpeed's AutoEP takes over: `gate` is a
linear child, `experts` holds fused 3-D weights, `shared_experts` is one module. Refuses to know of ranks and losses.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.model.config import ModelConfig
from minimind.model.layers import FeedForward, Linear, fill_normal, residual_std
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

    # How many rows an expert gets is known on the host alone, so a compiled model leaves its graph here.
    @torch.compiler.disable
    def forward(self, tokens: Tensor, experts: Tensor) -> Tensor:
        """(N, hidden_size) tokens through their (N, K) experts -> (N, K, hidden_size).

        An expert without tokens is not read, and its gradient is zero.
        """
        order = experts.flatten().argsort(stable=True)  # (N * K,): the choices, token by token, sorted by expert
        rows_per_expert = experts.flatten().bincount(minlength=len(self.down_proj)).tolist()
        outputs = self.compute(tokens.index_select(0, order // experts.shape[1]), rows_per_expert)
        return outputs.index_select(0, order.argsort()).unflatten(0, experts.shape)

    def compute(self, rows: Tensor, rows_per_expert: list[int]) -> Tensor:
        """(M, hidden_size) rows, sorted by expert -> the same shape."""
        outputs = []
        parts = rows.split(rows_per_expert)
        for own, gate_up, down in zip(parts, self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True):
            gate, up = F.linear(own, gate_up).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate) * up, down))
        return torch.cat(outputs)


class MoEFeedForward(nn.Module):
    """sum_k weight_k * expert_k(x) over a token's chosen experts, plus the shared experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = Linear(config.hidden_size, config.num_experts, config.initializer_range)
        self.experts = Experts(config)
        shared_size = config.n_shared_experts * config.expert_feed_forward_size
        self.shared_experts = FeedForward(config, shared_size) if shared_size else None
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.router_bias_update_rate else None
        self.register_buffer(BIAS_NAME, bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, hidden_size) -> the same shape."""
        tokens = hidden_states.flatten(0, -2)  # (N, hidden_size)
        weights, experts = route(self.gate(tokens), self.config, getattr(self, BIAS_NAME))  # (N, K)
        outputs = self.experts(tokens, experts)  # (N, K, hidden_size)
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
        self.coefficient = Linear(config.hidden_size, 2, config.initializer_range, bias=True)

    def forward(self, hidden_states: Tensor, mixed: Tensor) -> Tensor:
        """(..., hidden_size) what the experts read, and what they gave -> the same shape."""
        experts, own = self.coefficient(hidden_states).softmax(dim=-1, dtype=torch.float32).to(mixed.dtype).split(1, -1)
        return mixed * experts + self.mlp(hidden_states) * own
