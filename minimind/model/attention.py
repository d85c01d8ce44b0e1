"""Causal self-attention with multi-head, multi-query or grouped-query heads, optional QK-norm, and a KV cache.

The fused kernels of torch where the config allows (on a CPU in 16 bit, short rows by matrix products, which are faster
there), else the plain score matrix, which is also the tests' reference.
Refuses to decide who sees whom (`visibility`) and where a token stands (`rope`).
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from minimind.model.attention_mask import SegmentGroups, Visibility
from minimind.model.config import ModelConfig
from minimind.model.kernels.matmul import is_better_widened
from minimind.model.kv_cache import KVCache
from minimind.model.layers import Linear, RMSNorm, residual_std
from minimind.model.rope import rotate

# torch 2.10 to 2.13 spell causality and grouped heads in different ways.
_PARAMETERS = inspect.signature(varlen_attn).parameters
_VARLEN_OPTIONS: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in _PARAMETERS else {"is_causal": True}
if "enable_gqa" in _PARAMETERS:
    _VARLEN_OPTIONS["enable_gqa"] = True

# Causal rows up to this long are computed by matrix products on a CPU in 16 bit. Measured on AVX512-BF16 (one thread,
# forward and backward, beside torch's fused kernel): 5.7x at 32 tokens, 3x at 192, 2.2x at 512. Longer rows would keep
# too large score matrices for the backward pass.
_LONGEST_BY_PRODUCTS = 1024


class Attention(nn.Module):
    """One layer's attention. Grouped heads share keys and values without repeating them in memory."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_size = config.head_size
        self.flash_attn = config.flash_attn
        self.dropout = config.attention_dropout
        query_size = config.num_attention_heads * config.head_size
        key_size = config.num_key_value_heads * config.head_size
        self.q_proj = Linear(config.hidden_size, query_size, config.initializer_range)
        self.k_proj = Linear(config.hidden_size, key_size, config.initializer_range)
        self.v_proj = Linear(config.hidden_size, key_size, config.initializer_range)
        self.o_proj = Linear(query_size, config.hidden_size, residual_std(config))
        self.q_norm = RMSNorm(config.head_size, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_size, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self,
        hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor],
        visibility: Visibility,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, T, hidden_size) -> the same shape. `rotary`: tables of the T new tokens, from `rope.rotary_tables`."""
        queries, keys, values = self.project(hidden_states, rotary)
        dropout = self.dropout if self.training else 0.0
        if visibility.cu_seqlens is not None:
            mixed = attend_varlen(queries, keys, values, visibility.cu_seqlens)
        elif visibility.segment_groups is not None:
            mixed = attend_groups(queries, keys, values, visibility.segment_groups, dropout)
        else:
            queries = queries.transpose(1, 2)  # (B, num_heads, T, head_size)
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)
            if cache is not None:
                keys, values = cache.write(self.layer, keys, values)
            attend = attend_fused if self.flash_attn else attend_plainly
            mixed = attend(queries, keys, values, visibility, dropout).transpose(1, 2)
        return self.o_proj(mixed.flatten(2))

    def project(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, num_heads, head_size), keys and values (B, T, num_kv_heads, head_size), normed and rotated."""
        queries = self.q_proj(hidden_states).unflatten(-1, (-1, self.head_size))
        keys = self.k_proj(hidden_states).unflatten(-1, (-1, self.head_size))
        values = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_size))
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        return rotate(queries, *rotary).to(values.dtype), rotate(keys, *rotary).to(values.dtype), values


def attend_fused(queries: Tensor, keys: Tensor, values: Tensor, visibility: Visibility, dropout: float) -> Tensor:
    """(B, num_heads, T, head_size) queries on (B, num_kv_heads, S, head_size) keys and values -> the queries' shape."""
    if is_better_widened(queries[0, 0]):
        return _attend_widened(attend_fused, queries, keys, values, visibility, dropout)
    on_cpu_in_16_bit = queries.device.type == "cpu" and queries.dtype in (torch.bfloat16, torch.float16)
    if on_cpu_in_16_bit and visibility.is_causal and not dropout and queries.shape[2] <= _LONGEST_BY_PRODUCTS:
        return attend_by_products(queries, keys, values)
    return F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=visibility.mask,
        dropout_p=dropout,
        is_causal=visibility.is_causal,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )


def attend_by_products(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """As `attend_fused` where every query sees the keys up to its own, by two batched matrix products.

    Scores are in the inputs' dtype, as in `attend_plainly`; softmax computes in float32.
    """
    batch_size, num_heads, length, head_size = queries.shape
    num_rows, group = batch_size * keys.shape[1], num_heads // keys.shape[1]
    queries = queries.reshape(num_rows, group * length, head_size)  # the queries of a group share their keys
    keys, values = keys.reshape(num_rows, length, head_size), values.reshape(num_rows, length, head_size)
    hidden = queries.new_full((length, length), float("-inf")).triu(1).repeat(group, 1)
    # Added within the product: a separate mask would read and write all scores once more, and again in backward.
    scores = torch.baddbmm(hidden, queries, keys.transpose(1, 2), alpha=head_size**-0.5)
    return (scores.softmax(dim=-1) @ values).view(batch_size, num_heads, length, head_size)


def attend_plainly(queries: Tensor, keys: Tensor, values: Tensor, visibility: Visibility, dropout: float) -> Tensor:
    """As `attend_fused`, by the score matrix written out; softmax in float32."""
    if is_better_widened(queries[0, 0]):
        return _attend_widened(attend_plainly, queries, keys, values, visibility, dropout)
    batch_size, num_heads, num_queries, head_size = queries.shape
    num_kv_heads, num_keys = keys.shape[1:3]
    grouped = queries.view(batch_size, num_kv_heads, num_heads // num_kv_heads, num_queries, head_size)
    scores = grouped @ keys.unsqueeze(2).transpose(-2, -1) * head_size**-0.5  # (B, num_kv_heads, group, T, S)
    mask = visibility.mask
    if visibility.is_causal:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=queries.device).tril()[None, None]
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(2), float("-inf"))
    weights = F.dropout(scores.softmax(dim=-1, dtype=torch.float32), dropout).to(values.dtype)
    return (weights @ values.unsqueeze(2)).view(batch_size, num_heads, num_queries, head_size)


def _attend_widened(
    attend: Callable[..., Tensor], queries: Tensor, keys: Tensor, values: Tensor, visibility: Visibility, dropout: float
) -> Tensor:
    """As `attend`, computed in float32 and rounded at the end."""
    with torch.autocast("cpu", enabled=False):
        return attend(queries.float(), keys.float(), values.float(), visibility, dropout).to(queries.dtype)


def attend_varlen(queries: Tensor, keys: Tensor, values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Causal attention inside each segment by the variable-length kernel, (B, T, num_heads, head_size) throughout."""
    longest = queries.shape[1]  # a segment ends with its row; the true maximum would cost a wait for the device
    mixed: Any = varlen_attn(
        queries.flatten(0, 1),
        keys.flatten(0, 1),
        values.flatten(0, 1),
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        **_VARLEN_OPTIONS,
    )
    return mixed.view(queries.shape)


@torch.compiler.disable  # see `visibility.group_segments`
def attend_groups(queries: Tensor, keys: Tensor, values: Tensor, groups: SegmentGroups, dropout: float) -> Tensor:
    """Causal attention inside each segment, one call for each batch of documents; (B, T, num_heads, head_size)."""
    mixed = []
    for tokens in groups.batches:
        gathered = attend_fused(
            _gather(queries, tokens), _gather(keys, tokens), _gather(values, tokens), Visibility(), dropout
        )
        mixed.append(gathered.transpose(1, 2).flatten(0, 1))  # (num_documents * L, num_heads, head_size)
    return torch.cat(mixed).index_select(0, groups.inverse).view(queries.shape)


def _gather(x: Tensor, tokens: Tensor) -> Tensor:
    """(B, T, heads, head_size) and (num_documents, L) flat places -> (num_documents, heads, L, head_size)."""
    return x.flatten(0, 1).index_select(0, tokens.flatten()).unflatten(0, tokens.shape).transpose(1, 2)
