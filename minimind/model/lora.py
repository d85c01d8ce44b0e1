"""LoRA's adapters on a built model (arXiv 2106.09685), and a model's weights frozen but for what is trained.

Applied from outside, as kernels are: a layer exchanges its class and gets parameters more, so its weights keep their
names, and whatever was attached to it. What is trained is said by `model.tuning`.
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.model.layers import Linear, fill_normal
from minimind.model.moe import Experts
from minimind.model.transformer import MiniMindForCausalLM
from minimind.model.tuning import LoRA, adapters_of, parameter_shapes, trained_shapes


class LoRALinear(Linear):
    """A linear layer with adapters: W x + scale * B (A x)."""

    lora_A: nn.Parameter  # (rank, in_features)
    lora_B: nn.Parameter  # (out_features, rank)
    lora_scale: float

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return super().forward(x) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.lora_scale


class LoRAExperts(Experts):
    """Routed experts with adapters, one expert after another."""

    gate_up_lora_A: nn.Parameter  # (E, rank, hidden_size)
    gate_up_lora_B: nn.Parameter  # (E, 2 * I, rank)
    down_lora_A: nn.Parameter  # (E, rank, I)
    down_lora_B: nn.Parameter  # (E, hidden_size, rank)
    lora_scale: float

    def compute(self, rows: Tensor, rows_per_expert: list[int]) -> Tensor:
        """As `Experts.compute`."""
        gate_ups = zip(
            self.gate_up_proj.unbind(), self.gate_up_lora_A.unbind(), self.gate_up_lora_B.unbind(), strict=True
        )
        downs = zip(self.down_proj.unbind(), self.down_lora_A.unbind(), self.down_lora_B.unbind(), strict=True)
        outputs = []
        for own, gate_up, down in zip(rows.split(rows_per_expert), gate_ups, downs, strict=True):
            gate, up = self._adapted(own, *gate_up).chunk(2, dim=-1)
            outputs.append(self._adapted(F.silu(gate) * up, *down))
        return torch.cat(outputs)

    def _adapted(self, x: Tensor, weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return F.linear(x, weight) + F.linear(F.linear(x, first), second) * self.lora_scale


_ADAPTED: dict[type[nn.Module], type[nn.Module]] = {Linear: LoRALinear, Experts: LoRAExperts}


def add_adapters(model: MiniMindForCausalLM, lora: LoRA) -> None:
    """Give the matrices that `lora` names their adapters: A drawn with standard deviation 1 / sqrt(3 * in_features), B
    at zero, so that the model computes at first what it did before."""
    shapes = trained_shapes(model.config, lora)  # of a slice under ZeRO-3 the tensor does not say its shape
    for name in filter(lora.has, parameter_shapes(model.config)):
        weight, (first, second) = model.get_parameter(name), adapters_of(name)
        module = model.get_submodule(first.rpartition(".")[0])
        module.__class__ = _ADAPTED.get(type(module), type(module))
        module.lora_scale = lora.scale  # type: ignore[assignment]
        for adapter in (first, second):
            start = torch.zeros(shapes[adapter], dtype=weight.dtype, device=weight.device)
            if adapter == first:
                fill_normal(start, (3 * start.shape[-1]) ** -0.5)
            module.register_parameter(adapter.rpartition(".")[2], nn.Parameter(start))


def train_only(model: nn.Module, trained: Collection[str]) -> None:
    """Freeze every parameter but those of these names."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def merge(weight: Tensor, first: Tensor, second: Tensor, scale: float) -> Tensor:
    """The matrix that computes what W (..., out, in) and its adapters A (..., rank, in) and B (..., out, rank) do,
    float32."""
    return torch.add(weight.float(), second.float() @ first.float(), alpha=scale)
