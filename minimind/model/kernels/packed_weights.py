"""A loaded model's matrices laid out for decoding on a CPU, where a token costs one pass over all weights.

Matrices are stored in oneDNN's own layout, or by columns if the model will be compiled; or, smaller, as 8-bit integers
with one scale a row (weight-only, per channel: arXiv 2206.01861). For inference alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.model import MiniMindForCausalLM
from minimind.model.attention import Attention
from minimind.model.kernels.apply import chosen_kernels
from minimind.model.kernels.attention import FastAttention
from minimind.model.kernels.matmul import has_fast_matmul, has_onednn, onednn_matmul, pack
from minimind.model.layers import FeedForward
from minimind.model.loss import IGNORE_INDEX
from minimind.model.rope import rotate

# Matrices that stay as they are: a router must choose as it was trained to, and so small ones gain nothing.
_KEPT = ("gate", "coefficient")


@torch.no_grad()
def prepare_decoding(model: MiniMindForCausalLM, *, int8: bool, compiled: bool = False) -> None:
    """Lay out a loaded model's matrices for the fastest decoding; on a GPU they stay as they are.

    Args:
        int8: round the matrices to 8 bits; with `MINIMIND_KERNELS=plain` too.
        compiled: the model will be compiled, and a compiler cannot read oneDNN's layout.
    """
    if int8:
        quantize_int8(model)
    elif "packed" in chosen_kernels():
        if compiled or not can_pack(model.lm_head.weight):
            lay_out_by_columns(model)
        else:
            _replace(model, PackedLinear, PackedHead)


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN multiplies by matrices of this kind on this processor."""
    if not weight.is_cpu or not has_onednn():
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and has_fast_matmul(torch.bfloat16))


def lay_out_by_columns(model: MiniMindForCausalLM) -> None:
    """Store every float32 matrix on a CPU column by column: the same numbers, their sums rounded in a different order.

    A tied output matrix becomes a copy: the embedding reads rows.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.dtype == torch.float32 and not module.weight.is_cuda:
            module.weight = nn.Parameter(module.weight.detach().t().contiguous().t(), requires_grad=False)


@torch.no_grad()
def quantize_int8(model: MiniMindForCausalLM) -> None:
    """Replace the matrices of a bfloat16 model on a CPU by 8-bit ones. Norms, embedding, routers and routed experts
    stay as they are."""
    _replace(model, Int8Linear, Int8Head)


class PackedLinear(nn.Module):
    """A matrix (out, in) in oneDNN's own layout."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("packed", pack(linear.weight.detach()), persistent=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        product = onednn_matmul(x, self.packed)  # type: ignore[arg-type]
        return product if self.bias is None else product + self.bias


class Int8Linear(nn.Module):
    """A matrix (out, in) as int8 with a bfloat16 scale for each row; bfloat16 in and out, on a CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        self.register_buffer("quantized", (weight / scale[:, None]).round().to(torch.int8), persistent=False)
        self.register_buffer("scale", scale.to(torch.bfloat16), persistent=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        rows = x.reshape(-1, x.shape[-1])
        product = torch._weight_int8pack_mm(rows, self.quantized, self.scale)  # type: ignore[arg-type]
        product = product.view(*x.shape[:-1], -1)
        return product if self.bias is None else product + self.bias


class _Head(nn.Module):
    """The output matrix in the form of the class that is mixed in: scores by it, and the loss by them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.weight = linear.weight  # the embedding, where the two are tied: dtype and device of the model

    def forward(self, x: Tensor, labels: Tensor | None = None, reduction: str = "mean", *_: None) -> Tensor:
        """As `minimind.model.loss.LMHead.forward`, without what only training has."""
        logits = super().forward(x)
        if labels is None:
            return logits
        logits = logits.float().flatten(0, -2)
        losses = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX, reduction=reduction)
        return losses.view_as(labels) if reduction == "none" else losses


class PackedHead(_Head, PackedLinear):
    """The output matrix in oneDNN's layout."""


class Int8Head(_Head, Int8Linear):
    """The output matrix as 8-bit integers."""


def _replace(model: nn.Module, form: type[nn.Module], head: type[nn.Module]) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Attention):
                setattr(module, name, JoinedAttention(child))
            elif isinstance(child, FeedForward):
                setattr(module, name, JoinedFeedForward(child))
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name not in _KEPT:
                setattr(module, name, head(child) if name == "lm_head" else form(child))


class JoinedAttention(FastAttention):
    """One matrix for queries, keys and values, one norm and one rotation for queries and keys: fewer calls a token."""

    def __init__(self, source: Attention) -> None:
        nn.Module.__init__(self)
        self.layer, self.head_size = source.layer, source.head_size
        self.flash_attn, self.dropout = source.flash_attn, source.dropout
        self.num_heads = source.q_proj.out_features // self.head_size
        self.num_kv_heads = source.k_proj.out_features // self.head_size
        self.qkv_proj = _join(source.q_proj, source.k_proj, source.v_proj)
        self.o_proj = source.o_proj
        self.eps, scale = 0.0, None
        if source.q_norm is not None and source.k_norm is not None:
            self.eps = source.q_norm.eps
            pairs = ((source.q_norm, self.num_heads), (source.k_norm, self.num_kv_heads))
            scale = torch.cat([norm.weight.detach().float().expand(count, -1) for norm, count in pairs])
        self.register_buffer("scale", scale, persistent=False)  # (num_heads + num_kv_heads, head_size) float32

    def project(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """As in `Attention`; norm and rotation are computed in float32, with one rounding at the end."""
        heads = self.qkv_proj(hidden_states).unflatten(-1, (-1, self.head_size))
        turned, values = heads.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=2)
        if self.scale is not None:
            turned = F.rms_norm(turned.float(), (self.head_size,), None, self.eps) * self.scale  # type: ignore[operator]
        turned = rotate(turned, *rotary).to(values.dtype)
        queries, keys = turned.split((self.num_heads, self.num_kv_heads), dim=2)
        return queries, keys, values


class JoinedFeedForward(nn.Module):
    """SwiGLU with one matrix for gate and up."""

    def __init__(self, source: FeedForward) -> None:
        super().__init__()
        self.gate_up_proj = _join(source.gate_proj, source.up_proj)
        self.down_proj = source.down_proj

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden_size) -> the same shape."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


def _join(*matrices: nn.Linear) -> nn.Linear:
    """One matrix that gives the outputs of all, side by side."""
    weight = torch.cat([matrix.weight.detach() for matrix in matrices])
    has_bias = matrices[0].bias is not None
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=has_bias, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if has_bias:
        joined.bias = nn.Parameter(torch.cat([matrix.bias.detach() for matrix in matrices]), requires_grad=False)
    return joined
