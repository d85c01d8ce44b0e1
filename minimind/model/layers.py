"""The layers of a block: linear layers and embeddings with MiniMind's initialization, RMSNorm, SwiGLU.

Each layer fills its own weight at construction, so a model built under DeepSpeed's `zero.Init`, which partitions a
weight as soon as its layer exists, starts like any other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.model.config import ModelConfig


@torch.no_grad()
def fill_normal(weight: Tensor, std: float) -> None:
    """Fill `weight` in place from a normal distribution.

    Drawn in float32 whatever the dtype, so that one seed gives the same start in float32 and, rounded, in bfloat16.
    """
    weight.copy_(weight.float().normal_(0.0, std))


def residual_std(config: ModelConfig) -> float:
    """Initial standard deviation of matrices that write to the residual stream: initializer_range / sqrt(2 * layers).

    Each layer adds two of them, so the variance of the stream does not grow with depth (GPT-2, Radford et al. 2019).
    """
    return config.initializer_range / (2 * config.num_hidden_layers) ** 0.5


class Linear(nn.Linear):
    """A linear layer whose weight starts with standard deviation `std`, and its bias, if any, at 0."""

    def __init__(self, in_features: int, out_features: int, std: float, bias: bool = False) -> None:
        self.std = std
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        """Draw a fresh weight."""
        fill_normal(self.weight, self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """An embedding that starts with standard deviation `std`."""

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
        # One dtype for both: a float32 weight on a bfloat16 input, as under autocast, would miss torch's fused kernel.
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x)), of inner width `size`."""

    def __init__(self, config: ModelConfig, size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, size, config.initializer_range)
        self.up_proj = Linear(config.hidden_size, size, config.initializer_range)
        self.down_proj = Linear(size, config.hidden_size, residual_std(config))

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden_size) -> the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
