"""A loaded model's matrices laid out for decoding on a CPU, where a token costs one pass over all weights.

float32 matrices are kept column by column, which torch multiplies by one vector faster; or, to a smaller size, as
8-bit integers with one scale a row (arXiv 2206.01861 calls that weight-only, per channel). Knows nothing of sampling.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.model import MiniMindForCausalLM
from minimind.model.loss import IGNORE_INDEX


def prepare_decoding(model: MiniMindForCausalLM, *, int8: bool) -> None:
    """Lay out a loaded model's matrices for the fastest decoding; on a GPU they stay as they are."""
    if int8:
        quantize_int8(model)
    else:
        lay_out_by_columns(model)


@torch.no_grad()
def lay_out_by_columns(model: MiniMindForCausalLM) -> None:
    """Store every float32 matrix on a CPU column by column; the same numbers, rounded in another order of sums.

    A tied output matrix becomes a copy: the embedding reads rows. For inference alone.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.dtype == torch.float32 and not module.weight.is_cuda:
            module.weight = nn.Parameter(module.weight.t().contiguous().t(), requires_grad=False)


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


class Int8Head(Int8Linear):
    """The output matrix: scores of 8-bit weights, and the loss by them."""

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


@torch.no_grad()
def quantize_int8(model: MiniMindForCausalLM) -> None:
    """Replace the matrices of a bfloat16 model on a CPU by 8-bit ones. Norms, embedding, routers and routed experts
    stay as they are. For inference alone.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name not in ("gate", "coefficient"):
                setattr(module, name, Int8Head(child) if name == "lm_head" else Int8Linear(child))
