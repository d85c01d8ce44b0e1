"""The operators that only CUDA has here: what they give, and what the real ones refuse."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from simulated_device.collectives import as_host
from simulated_device.device_module import device, state

_registrations = torch.library.Library("aten", "IMPL")


def _fill(template: Tensor, value: Tensor, name: str, reads: list[Tensor]) -> Tensor:
    """A tensor of the device like `value`, written by operator `name` from `reads`."""
    target = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=template.device)
    as_host(target).copy_(value)
    device.check_use(reads, [target], name)
    return target


# Attention inside the documents of flat tokens.


def _check_flash(query: Tensor, borders: tuple[Tensor | None, Tensor | None]) -> None:
    if state.machine.profile.capability < (8, 0):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if query.shape[-1] > 256 or query.shape[-1] % 8:
        raise RuntimeError("FlashAttention forward only supports head dimension at most 256 and a multiple of 8")
    if any(border is None or border.dtype != torch.int32 for border in borders):
        raise RuntimeError("cu_seqlens_q must have dtype int32")


def _allowed(
    borders_q: Tensor, borders_k: Tensor, causal: bool, left: int | None, right: int | None, sizes: Any
) -> Tensor:
    """(rows of q, rows of k) bool: which key a query may see."""
    row_q, row_k = (torch.arange(size) for size in sizes)
    document_q = torch.bucketize(row_q, borders_q[1:], right=True).clamp(max=len(borders_q) - 2)
    document_k = torch.bucketize(row_k, borders_k[1:], right=True).clamp(max=len(borders_k) - 2)
    same = document_q[:, None] == document_k[None, :]
    shift = (borders_k.diff() - borders_q.diff())[document_q]
    place_q = row_q - borders_q[document_q] + shift
    distance = (row_k - borders_k[document_k])[None, :] - place_q[:, None]
    if causal:
        same &= distance <= 0
    if left is not None and left >= 0:
        same &= distance >= -left
    if right is not None and right >= 0:
        same &= distance <= right
    return same


def _scores(query: Tensor, key: Tensor, borders: Any, causal: bool, scale: float | None, window: Any) -> Tensor:
    """(heads, rows of q, rows of k) float32, -inf where nothing may be seen."""
    q, k = query.float().transpose(0, 1), key.float().transpose(0, 1)
    k = k.repeat_interleave(q.shape[0] // k.shape[0], 0)
    scores = q @ k.transpose(1, 2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    allowed = _allowed(*(border.long() for border in borders), causal, *window, (len(query), len(key)))
    return scores.masked_fill(~allowed, float("-inf"))


def _flash_forward(
    query: Tensor, key: Tensor, value: Tensor, cum_seq_q: Tensor, cum_seq_k: Tensor, max_q: int, max_k: int,
    dropout_p: float, is_causal: bool, return_debug_mask: bool, *, scale: float | None = None,
    window_size_left: int | None = None, window_size_right: int | None = None, **_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    _check_flash(query, (cum_seq_q, cum_seq_k))
    reads = [query, key, value, cum_seq_q, cum_seq_k]
    q, k, v, *borders = map(as_host, reads)
    scores = _scores(q, k, borders, is_causal, scale, (window_size_left, window_size_right))
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().nan_to_num(0.0)
    v = v.float().transpose(0, 1).repeat_interleave(q.shape[1] // v.shape[1], 0)
    name = "aten::_flash_attention_forward"
    out = _fill(query, (weights @ v).transpose(0, 1).to(q.dtype).contiguous(), name, reads)
    nothing = query.new_empty(0)
    seed = torch.empty(2, dtype=torch.uint64, device=query.device)
    return out, _fill(query, lse, name, reads), seed, nothing, nothing


def _flash_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, cum_seq_q: Tensor,
    cum_seq_k: Tensor, max_q: int, max_k: int, dropout_p: float, is_causal: bool, rng_state: Tensor, unused: Tensor, *,
    scale: float | None = None, window_size_left: int | None = None, window_size_right: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    _check_flash(query, (cum_seq_q, cum_seq_k))
    reads = [query, key, value, grad_out]
    q, k, v, g = (as_host(tensor).float().transpose(0, 1) for tensor in reads)  # (heads, rows, head_size)
    group = q.shape[0] // k.shape[0]
    borders, window = (as_host(cum_seq_q), as_host(cum_seq_k)), (window_size_left, window_size_right)
    scores = _scores(as_host(query), as_host(key), borders, is_causal, scale, window)
    weights = scores.softmax(-1).nan_to_num(0.0)
    weight_grad = g @ v.repeat_interleave(group, 0).transpose(1, 2)
    score_grad = weights * (weight_grad - (weight_grad * weights).sum(-1, keepdim=True))
    score_grad = score_grad * (query.shape[-1] ** -0.5 if scale is None else scale)
    key_grad = (score_grad.transpose(1, 2) @ q).unflatten(0, (-1, group)).sum(1)
    value_grad = (weights.transpose(1, 2) @ g).unflatten(0, (-1, group)).sum(1)
    grads = (score_grad @ k.repeat_interleave(group, 0), key_grad, value_grad)
    name = "aten::_flash_attention_backward"
    return tuple(_fill(query, g.transpose(0, 1).to(query.dtype).contiguous(), name, reads) for g in grads)


def _flash_in_place(out: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    attended, lse, *_ = _flash_forward(*args, **kwargs)
    out.copy_(attended)
    return lse


# Causal or full attention over whole sequences.


def _repeat_heads(query: Tensor, *others: Tensor) -> list[Tensor]:
    """All on the host in float32, keys and values once for each query head. (B, heads, T, head_size)"""
    wide = [as_host(query).float()]
    return wide + [as_host(one).float().repeat_interleave(query.shape[1] // one.shape[1], 1) for one in others]


def _sdpa_forward(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False, *_: Any,
    scale: float | None = None, **__: Any,
) -> tuple[Any, ...]:  # fmt: skip
    wide, reads = _repeat_heads(query, key, value), [query, key, value]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*wide, 0.0, is_causal, scale=scale)
    name = "aten::_scaled_dot_product_flash_attention"
    # The heads of a token lie side by side.
    made = _fill(query, out.to(query.dtype).transpose(1, 2).contiguous(), name, reads).transpose(1, 2)
    seed, nothing = torch.empty(2, dtype=torch.uint64, device=query.device), query.new_empty(0)
    lengths = torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int32)
    return made, _fill(query, lse, name, reads), *lengths, query.shape[2], key.shape[2], seed, nothing, nothing


def _sdpa_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, cum_seq_q: Tensor,
    cum_seq_k: Tensor, max_q: int, max_k: int, dropout_p: float, is_causal: bool, philox_seed: Tensor,
    philox_offset: Tensor, *, scale: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    wide = _repeat_heads(query, key, value)
    made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*wide, 0.0, is_causal, scale=scale)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        as_host(grad_out).float().contiguous(), *wide, *made, 0.0, is_causal, scale=scale
    )
    reads, name = [grad_out, query, key, value, out], "aten::_scaled_dot_product_flash_attention_backward"
    narrow = [grad.unflatten(1, (one.shape[1], -1)).sum(2) for grad, one in zip(grads, reads[1:4], strict=True)]
    return tuple(_fill(query, grad.to(query.dtype), name, reads) for grad in narrow)


# The norm, which keeps its input and a number a row.


def _norm(input: Tensor, shape: list[int], weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
    x, dims = as_host(input).float(), tuple(range(-len(shape), 0))
    rstd = (x.square().mean(dims, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()
    y = (x * rstd * (1.0 if weight is None else as_host(weight).float())).to(input.dtype)
    reads = [input] if weight is None else [input, weight]
    return tuple(_fill(input, made, "aten::_fused_rms_norm", reads) for made in (y, rstd))  # type: ignore[return-value]


def _norm_backward(
    grad_out: Tensor, input: Tensor, shape: list[int], rstd: Tensor, weight: Tensor | None, output_mask: list[bool]
) -> tuple[Tensor, Tensor | None]:
    grad, inverse, dims = as_host(grad_out).float(), as_host(rstd), tuple(range(-len(shape), 0))
    normed = as_host(input).float() * inverse
    weighted = grad * (1.0 if weight is None else as_host(weight).float())
    slope = inverse * (weighted - normed * (weighted * normed).mean(dims, keepdim=True))
    reads, name = [grad_out, input, rstd], "aten::_fused_rms_norm_backward"
    of_input = _fill(input, slope.to(input.dtype), name, reads)
    if weight is None or not output_mask[1]:
        return of_input, None
    of_weight = (grad * normed).flatten(0, -len(shape) - 1).sum(0).to(weight.dtype)
    return of_input, _fill(input, of_weight, name, reads)


# A softmax that reads 16 bits and gives float32.


def _softmax(function: Callable[..., Tensor]) -> Callable[[Tensor, int, bool], Tensor]:
    def call(self: Tensor, dim: int, half_to_float: bool) -> Tensor:
        host = as_host(self)
        made = function(host.float() if half_to_float else host, dim, False)
        return _fill(self, made, str(function), [self])

    return call


# A histogram of whole numbers.


def _histc(self: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    made = torch.histc(as_host(self).double(), bins, min, max)
    return _fill(self, made.to(self.dtype), "aten::histc", [self])


# Products of groups of rows with a matrix each.


def _check_grouped(a: Tensor, b: Tensor, offs: Tensor | None) -> None:
    if any(tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16) for tensor in (a, b)):
        raise RuntimeError(f"Expected mat_a to be Float32, BFloat16 or Float16 matrix, got {a.dtype} and {b.dtype}")
    for tensor in (a, b):
        if tensor.data_ptr() % 16:
            raise RuntimeError("expected data_ptr to be aligned to 16 bytes")
        (rows, columns), strides, unit = tensor.shape[-2:], tensor.stride()[-2:], 16 // tensor.element_size()
        if strides[0] == 1 and strides[1] >= max(1, rows):
            leading = strides[1]
        elif strides[1] == 1 and strides[0] >= max(1, columns):
            leading = strides[0]
        else:
            raise RuntimeError(
                f"Invalid strides/sizes, got {tensor.stride()} for strides and {tuple(tensor.shape)} for sizes"
            )
        if leading % unit:
            raise RuntimeError("strides should be multiple of 16 bytes")
    if offs is not None and offs.dtype != torch.int32:
        raise RuntimeError("Offsets have to be int32")


def _grouped_mm(
    self: Tensor, mat2: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    _check_grouped(self, mat2, offs)
    has_kernel = self.dtype == mat2.dtype == torch.bfloat16 and state.machine.profile.capability[0] in (9, 10)
    if not has_kernel and offs is not None:
        device.count_wait("grouped_mm reads its offsets (a loop: not bf16 on sm90 or sm100)")
    made = torch.ops.aten._grouped_mm(as_host(self), as_host(mat2), as_host(offs), bias, out_dtype)
    return _fill(self, made, "aten::_grouped_mm", [self, mat2, *([] if offs is None else [offs])])


def install() -> None:
    """Register them for the device."""
    _registrations.impl("_flash_attention_forward", _flash_forward, "CUDA")
    _registrations.impl("_flash_attention_backward", _flash_backward, "CUDA")
    if hasattr(torch.ops.aten, "_flash_attention_forward_no_dropout_inplace"):
        _registrations.impl("_flash_attention_forward_no_dropout_inplace", _flash_in_place, "CUDA")
    _registrations.impl("_scaled_dot_product_flash_attention", _sdpa_forward, "CUDA")
    _registrations.impl("_scaled_dot_product_flash_attention_backward", _sdpa_backward, "CUDA")
    _registrations.impl("_fused_rms_norm", _norm, "CUDA")
    _registrations.impl("_fused_rms_norm_backward", _norm_backward, "CUDA")
    _registrations.impl("histc", _histc, "CUDA")
    _registrations.impl("_softmax", _softmax(torch.ops.aten._softmax), "CUDA")
    _registrations.impl("_log_softmax", _softmax(torch.ops.aten._log_softmax), "CUDA")
    _registrations.impl("_grouped_mm", _grouped_mm, "CUDA")
