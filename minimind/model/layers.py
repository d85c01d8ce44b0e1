"""The small layers every block is made of: matrices and embeddings with MiniMind's start, RMSNorm, SwiGLU.

Each layer fills its own weight when it is made, so a model built under DeepSpeed's `zero.Init` (which cuts a weight up
as soon as its layer exists) starts like any other. Refuses to know of attention, experts or the loss.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.model.config import ModelConfig
from minimind.model.kernels.layers import gated_linear, is_recomputed, rms_norm
from minimind.model.kernels.matmul import linear


@torch.no_grad()
def fill_normal(weight: Tensor, std: float) -> None:
    """Fill `weight` in place from a normal distribution, drawn in float32 whatever the dtype.

    So one seed gives the same start in float32 and, rounded, in bfloat16.
    """
    weight.copy_(weight.float().normal_(0.0, std))


def residual_std(config: ModelConfig) -> float:
    """Start of the matrices that write to the residual stream: initializer_range / sqrt(2 * layers).

    Two of them a layer add up there, so the stream's variance does not grow with depth (GPT-2, Radford et al. 2019).
    """
    return config.initializer_range / (2 * config.num_hidden_layers) ** 0.5


class Linear(nn.Linear):
    """A matrix without bias that starts with standard deviation `std`."""

    def __init__(self, in_features: int, out_features: int, std: float) -> None:
        self.std = std
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Draw a fresh weight."""
        fill_normal(self.weight, self.std)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(x, self.weight)


class GatedLinear(Linear):
    """The matrix that ends a SwiGLU. It is given the two that it multiplies, so that it can do so again."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[override]
        """(..., in_features) each -> (..., out_features)."""
        if is_recomputed(gate):
            return gated_linear(gate, up, self.weight)
        return linear(F.silu(gate) * up, self.weight)


class BiasedLinear(nn.Linear):
    """A matrix that starts with standard deviation `std`, and a bias that starts at 0."""

    def __init__(self, in_features: int, out_features: int, std: float) -> None:
        self.std = std
        super().__init__(in_features, out_features)

    def reset_parameters(self) -> None:
        """Draw a fresh weight."""
        fill_normal(self.weight, self.std)
        nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """A table of token vectors that starts with standard deviation `std`."""

    def __init__(self, num_embeddings: int, embedding_dim: int, std: float) -> None:
        self.std = std
        super().__init__(num_embeddings, embedding_dim)

    def reset_parameters(self) -> None:
        """Draw a fresh weight."""
        fill_normal(self.weight, self.std)


class RMSNorm(nn.Module):
    """Root mean square normalization of the last dimension (arXiv 1910.07467), statistics in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> the same shape and dtype."""
        # One dtype for both: a float32 weight on a bfloat16 input, as under autocast, would miss the fused kernel.
        weight = self.weight.to(x.dtype)
        if is_recomputed(x):
            return rms_norm(x, weight, self.eps)
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x)), of inner width `size`."""

    def __init__(self, config: ModelConfig, size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, size, config.initializer_range)
        self.up_proj = Linear(config.hidden_size, size, config.initializer_range)
        self.down_proj = GatedLinear(size, config.hidden_size, residual_std(config))

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden_size) -> the same shape."""
        return self.down_proj(self.gate_proj(x), self.up_proj(x))
