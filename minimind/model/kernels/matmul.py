"""Matrix products on a CPU, by the fastest way this processor has.

In float32 torch calls MKL, which leaves half of an AMD processor with AVX512 idle; oneDNN, which comes with torch, does
not. In 16 bit torch calls oneDNN; on a processor without 16-bit products (AVX2 alone, as in most laptops) that is a
plain loop, up to 75 times slower than float32: there the factors are upcast, multiplied in float32 and rounded.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.model.layers import Linear
from minimind.model.lora import LoRALinear
from minimind.model.loss import LMHead, LossOfChunk, OnLosses

# Multiplications from which on oneDNN is worth its overhead: measured on Zen 5, equal to MKL at 16 x 256 x 256.
_SMALLEST = 2**21

# Rows from which on upcasting both factors is worth it: for fewer, reading a transposed matrix once in 16 bit is
# faster (Zen 3, matrices of 768 x 768 to 6400 x 768). One that is not transposed, as in gradients, is slow even then.
_FEWEST_ROWS = 8

CPU_CHUNK_LOGITS = 2**22
"""Logits of one chunk of the loss on a CPU: small enough for the caches, which is faster than the whole at once."""


def _find_fast_dtypes() -> set[torch.dtype]:
    if not has_onednn():
        return {torch.bfloat16, torch.float16}  # nothing is known of this processor
    ops = torch.ops.mkldnn
    asked = {torch.bfloat16: ops._is_mkldnn_bf16_supported, torch.float16: ops._is_mkldnn_fp16_supported}
    return {dtype for dtype, is_supported in asked.items() if is_supported()}


def has_onednn() -> bool:
    """Whether this torch has oneDNN and exposes its products."""
    names = ("_linear_pointwise", "_reorder_linear_weight")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


def _is_onednn_faster() -> bool:
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available() or not has_onednn():
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


# Plain values, so that torch.compile reads them as constants.
_FAST_DTYPES = _find_fast_dtypes()
_ONEDNN_IS_FASTER = _is_onednn_faster()


def has_fast_matmul(dtype: torch.dtype) -> bool:
    """Whether this processor has matrix products in `dtype`, bfloat16 or float16."""
    return dtype in _FAST_DTYPES


def is_onednn_faster() -> bool:
    """Whether oneDNN multiplies float32 matrices faster on this processor than what torch calls."""
    return _ONEDNN_IS_FASTER


def upcasts_to_fp32(x: Tensor, dtype: torch.dtype | None = None, fewest: int = _FEWEST_ROWS) -> bool:
    """Whether products of rows (..., k), in 16 bit by their own type or `dtype`, are to be computed in float32."""
    dtype = dtype or x.dtype
    if dtype not in (torch.bfloat16, torch.float16) or not x.is_cpu:
        return False
    return x.numel() >= fewest * max(1, x.shape[-1]) and not has_fast_matmul(dtype)


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `x` (..., in) times a matrix of `weight`'s size is to be computed by oneDNN."""
    return (
        is_onednn_faster()
        and x.dtype == weight.dtype == torch.float32
        and x.is_cpu
        and x.numel() * max(weight.shape) >= _SMALLEST
        and not torch.is_autocast_enabled("cpu")
    )


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` of (..., in) and (out, in); the sums are rounded in a different order."""
    is_trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    fewest = 1 if is_trained else _FEWEST_ROWS
    if x.is_cpu and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        if upcasts_to_fp32(x, dtype, fewest):
            with torch.autocast("cpu", enabled=False):
                return _Linear.apply(x.to(dtype), weight.to(dtype))
    elif upcasts_to_fp32(x, fewest=fewest) or uses_onednn(x, weight):
        return _Linear.apply(x, weight)
    return F.linear(x, weight)


def matmul(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """(m, k) times (k, n): (m, n), written to `out` if given. No gradient is kept."""
    if upcasts_to_fp32(left, fewest=1 if right.stride(-1) == 1 else _FEWEST_ROWS):
        with torch.autocast("cpu", enabled=False):
            product = (left.float() @ right.float()).to(left.dtype)
    elif uses_onednn(left, right):
        product = onednn_matmul(left, right.t())
    else:
        return torch.mm(left, right, out=out)
    return product if out is None else out.copy_(product)


def onednn_matmul(left: Tensor, right: Tensor) -> Tensor:
    """(..., k) times the transpose of (n, k), which may be a result of `pack`: (..., n). No gradient is kept."""
    if torch.compiler.is_compiling():
        return _traced_matmul(left, right)
    if left.numel() == 0:  # oneDNN has no empty product
        return left.new_zeros(*left.shape[:-1], right.shape[0])
    return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")


# torch.compile would lower oneDNN's own operator to something else; this one it leaves alone.
@torch.library.custom_op("minimind::onednn_matmul", mutates_args=())
def _traced_matmul(left: Tensor, right: Tensor) -> Tensor:
    return onednn_matmul(left, right)


@_traced_matmul.register_fake
def _(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(*left.shape[:-1], right.shape[0])


def pack(weight: Tensor) -> Tensor:
    """A matrix (n, k) in the layout that oneDNN reads fastest, opaque to everything but `onednn_matmul`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, 1)


class _Linear(torch.autograd.Function):
    """`linear`, upcast or by oneDNN, with both gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        x_grad = _multiply(grad, weight.t()) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return x_grad, None
        columns = x.flatten(0, -2).t()
        if x.dtype == torch.float32:  # oneDNN multiplies by rows
            columns = columns.contiguous()
        return x_grad, _multiply(grad.flatten(0, -2).t(), columns)


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """(..., k) times the transpose of (n, k): (..., n)."""
    if left.dtype == torch.float32:
        return onednn_matmul(left, right)
    return F.linear(left.float(), right.float()).to(left.dtype)


class FastLinear(Linear):
    """`Linear` by the products of this module."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        product = linear(x, self.weight)
        return product if self.bias is None else product + self.bias.to(product.dtype)


class FastLoRALinear(LoRALinear):
    """`LoRALinear` by the products of this module."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        product = linear(x, self.weight) + linear(linear(x, self.lora_A), self.lora_B) * self.lora_scale
        return product if self.bias is None else product + self.bias.to(product.dtype)


class FastLMHead(LMHead):
    """`LMHead` by the products of this module, in chunks that fit a CPU's caches."""

    chunk_logits = CPU_CHUNK_LOGITS
    matmul = staticmethod(matmul)

    def forward(
        self,
        hidden_states: Tensor,
        labels: Tensor | None = None,
        reduction: str = "mean",
        weights: Tensor | None = None,
        loss_of_chunk: LossOfChunk | None = None,
        on_losses: OnLosses | None = None,
    ) -> Tensor:
        """As `LMHead.forward`."""
        if labels is None:
            return linear(hidden_states, self.weight)
        return super().forward(hidden_states, labels, reduction, weights, loss_of_chunk, on_losses)

    @staticmethod
    def chunk_loss(
        logits: Tensor, targets: Tensor, counts: Tensor, z_loss_coef: float, need_grad: bool
    ) -> tuple[Tensor, Tensor | None]:
        """As `LMHead.chunk_loss`, with one exponential of each logit for loss and gradient, not two."""
        if not need_grad:
            return LMHead.chunk_loss(logits, targets, counts, z_loss_coef, need_grad)
        counted, indices = counts.unsqueeze(1), targets.unsqueeze(1).clamp(min=0)
        highest, target_logits = logits.amax(dim=1, keepdim=True).float(), logits.gather(1, indices).float()
        grad = logits.softmax(dim=-1, dtype=torch.float32)
        log_partition = highest - grad.amax(dim=1, keepdim=True).log_()
        losses = log_partition - target_logits + z_loss_coef * log_partition.square()
        if z_loss_coef:
            grad *= 1 + 2 * z_loss_coef * log_partition
        grad.scatter_add_(1, indices, grad.new_full((1, 1), -1.0).expand_as(indices))
        return losses * counted, grad.mul_(counted).to(logits.dtype)

    @staticmethod
    def add_matmul(total: Tensor, left: Tensor, right: Tensor) -> None:
        """As `LMHead.add_matmul`."""
        if upcasts_to_fp32(left):
            with torch.autocast("cpu", enabled=False):
                total.addmm_(left.float(), right.float())
        elif uses_onednn(left, right):
            total += matmul(left, right)
        else:
            LMHead.add_matmul(total, left, right)
