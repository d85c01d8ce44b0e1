"""LoRA's adapters on a built model (arXiv 2106.09685), and a model's weights frozen but for what is trained.

Applied from outside, as kernels are: a linear layer exchanges its class and gets two parameters more, so its weight
keeps its name, and whatever was attached to it. What is trained is said by `model.tuning`.
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.model.layers import Linear, fill_normal
from minimind.model.tuning import LoRA


class LoRALinear(Linear):
    """A linear layer with adapters: W x + scale * B (A x)."""

    lora_A: nn.Parameter  # (rank, in_features)
    lora_B: nn.Parameter  # (out_features, rank)
    lora_scale: float

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return super().forward(x) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.lora_scale


def add_adapters(model: nn.Module, lora: LoRA) -> None:
    """Give the matrices that `lora` names their adapters: A drawn with standard deviation 1 / sqrt(3 * in_features), B
    at zero, so that the model computes at first what it did before."""
    for name, module in model.named_modules():
        if type(module) is Linear and lora.has(f"{name}.weight"):
            _adapt(module, lora)


def _adapt(module: Linear, lora: LoRA) -> None:
    weight = module.weight  # a ZeRO-3 slice perhaps, so its shape says nothing
    first, second = (
        torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        for shape in ((lora.rank, module.in_features), (module.out_features, lora.rank))
    )
    fill_normal(first, (3 * module.in_features) ** -0.5)
    module.__class__ = LoRALinear
    assert isinstance(module, LoRALinear)
    module.lora_A, module.lora_B, module.lora_scale = nn.Parameter(first), nn.Parameter(second), lora.scale


def train_only(model: nn.Module, trained: Collection[str]) -> None:
    """Freeze every parameter but those of these names."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def merge(weight: Tensor, first: Tensor, second: Tensor, scale: float) -> Tensor:
    """The matrix that computes what W (out, in) and its adapters A (rank, in) and B (out, rank) do, float32."""
    return torch.addmm(weight.float(), second.float(), first.float(), alpha=scale)
