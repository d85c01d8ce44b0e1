"""A loaded model's matrices laid out for decoding on a CPU, where a token costs one pass over all weights.

Matrices are kept in the order in which oneDNN reads them, or by columns where they are to be compiled; or, to a smaller
size, as 8-bit integers with one scale a row (arXiv 2206.01861 calls that weight-only, per channel). Knows nothing of
sampling.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.model import MiniMindForCausalLM
from minimind.model.loss import IGNORE_INDEX
from minimind.model.products import has_onednn, onednn_product, pack

# Matrices that stay as they are: a router must choose as it was trained to, and so small ones gain nothing.
_KEPT = ("gate", "coefficient")


def prepare_decoding(model: MiniMindForCausalLM, *, int8: bool, compiled: bool = False) -> None:
    """Lay out a loaded model's matrices for the fastest decoding; on a GPU they stay as they are.

    Args:
        compiled: the model is going to be compiled, which knows nothing of oneDNN's order.
    """
    if int8:
        quantize_int8(model)
    elif compiled or not can_pack(model.lm_head.weight):
        lay_out_by_columns(model)
    else:
        pack_matrices(model)


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN multiplies by matrices of this kind on this processor."""
    if weight.device.type != "cpu" or not has_onednn():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


@torch.no_grad()
def lay_out_by_columns(model: MiniMindForCausalLM) -> None:
    """Store every float32 matrix on a CPU column by column; the same numbers, rounded in another order of sums.

    A tied output matrix becomes a copy: the embedding reads rows. For inference alone.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.dtype == torch.float32 and not module.weight.is_cuda:
            module.weight = nn.Parameter(module.weight.t().contiguous().t(), requires_grad=False)


class PackedLinear(nn.Module):
    """A matrix (out, in) in oneDNN's own order."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("packed", pack(linear.weight.detach()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return onednn_product(x, self.packed)  # type: ignore[arg-type]


class Int8Linear(nn.Module):
    """A matrix (out, in) as int8 with a bfloat16 scale for each row; bfloat16 in and out, on a CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        self.register_buffer("quantized", (weight / scale[:, None]).round().to(torch.int8), persistent=False)
        self.register_buffer("scale", scale.to(torch.bfloat16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        rows = x.reshape(-1, x.shape[-1])
        product = torch._weight_int8pack_mm(rows, self.quantized, self.scale)  # type: ignore[arg-type]
        return product.view(*x.shape[:-1], -1)


class _Head(nn.Module):
    """An output matrix of another form: scores by it, and the loss by them. The form is the class beside it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.weight = linear.weight  # the embedding, where the two are tied: type and device of the model

    def forward(self, x: Tensor, labels: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """As `minimind.model.loss.LMHead.forward`, without a z-loss."""
        logits = super().forward(x)
        if labels is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORE_INDEX,
                               reduction=reduction)  # fmt: skip


class PackedHead(_Head, PackedLinear):
    """The output matrix in oneDNN's order."""


class Int8Head(_Head, Int8Linear):
    """The output matrix as 8-bit integers."""


@torch.no_grad()
def pack_matrices(model: MiniMindForCausalLM) -> None:
    """Replace the matrices of a float32 or bfloat16 model on a CPU by copies in oneDNN's order: the same numbers, their
    sums rounded in another order. Norms, embedding, routers and routed experts stay as they are. For inference alone.
    """
    _replace(model, PackedLinear, PackedHead)


@torch.no_grad()
def quantize_int8(model: MiniMindForCausalLM) -> None:
    """Replace the matrices of a bfloat16 model on a CPU by 8-bit ones. Norms, embedding, routers and routed experts
    stay as they are. For inference alone.
    """
    _replace(model, Int8Linear, Int8Head)


def _replace(model: nn.Module, form: type[nn.Module], head: type[nn.Module]) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name not in _KEPT:
                setattr(module, name, head(child) if name == "lm_head" else form(child))
