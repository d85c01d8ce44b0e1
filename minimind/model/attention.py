"""Causal self-attention with multi-head, multi-query or grouped-query heads, optional QK-norm, and a KV cache."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.model.attention_mask import AttentionMask
from minimind.model.config import ModelConfig
from minimind.model.kv_cache import KVCache
from minimind.model.layers import Linear, RMSNorm, residual_std
from minimind.model.rope import rotate


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
        self.q_proj = Linear(config.hidden_size, query_size, config.initializer_range, config.attention_bias)
        self.k_proj = Linear(config.hidden_size, key_size, config.initializer_range, config.attention_bias)
        self.v_proj = Linear(config.hidden_size, key_size, config.initializer_range, config.attention_bias)
        self.o_proj = Linear(query_size, config.hidden_size, residual_std(config))
        self.q_norm = RMSNorm(config.head_size, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_size, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self,
        hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: AttentionMask,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, T, hidden_size) -> the same shape. `rotary`: tables of the T new tokens, from `rope.rotary_tables`."""
        queries, keys, values = (heads.transpose(1, 2) for heads in self.project(hidden_states, rotary))
        if cache is not None:
            keys, values = cache.write(self.layer, keys, values)
        mixed = self.attend(queries, keys, values, mask)  # (B, num_heads, T, head_size)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def project(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, num_heads, head_size), keys and values (B, T, num_kv_heads, head_size), normed and rotated."""
        queries = self.q_proj(hidden_states).unflatten(-1, (-1, self.head_size))
        keys = self.k_proj(hidden_states).unflatten(-1, (-1, self.head_size))
        values = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_size))
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        return rotate(queries, *rotary).to(values.dtype), rotate(keys, *rotary).to(values.dtype), values

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: AttentionMask) -> Tensor:
        """(B, num_heads, T, head_size) queries on (B, num_kv_heads, S, head_size) keys and values -> queries' shape."""
        attention = fused_attention if self.flash_attn else explicit_attention
        return attention(queries, keys, values, mask, self.dropout if self.training else 0.0)


def fused_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: AttentionMask, dropout: float) -> Tensor:
    """Attention by torch's fused kernels; shapes as in `Attention.attend`."""
    return F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask.allowed,
        dropout_p=dropout,
        is_causal=mask.is_causal,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )


def explicit_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: AttentionMask, dropout: float) -> Tensor:
    """The same, with the score matrix written out; softmax in float32."""
    batch_size, num_heads, num_queries, head_size = queries.shape
    num_kv_heads, num_keys = keys.shape[1:3]
    grouped = queries.reshape(batch_size, num_kv_heads, num_heads // num_kv_heads, num_queries, head_size)
    scores = grouped @ keys.unsqueeze(2).transpose(-2, -1) * head_size**-0.5  # (B, num_kv_heads, group, T, S)
    allowed = mask.allowed
    if mask.is_causal:
        allowed = torch.ones(num_queries, num_keys, dtype=torch.bool, device=queries.device).tril()[None, None]
    if allowed is not None:
        scores = scores.masked_fill(~allowed.unsqueeze(2), float("-inf"))
    weights = F.dropout(scores.softmax(dim=-1, dtype=torch.float32), dropout).to(values.dtype)
    return (weights @ values.unsqueeze(2)).view(batch_size, num_heads, num_queries, head_size)
