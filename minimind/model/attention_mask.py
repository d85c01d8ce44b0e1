"""Which keys each query may attend to: causality, padding, cached tokens and document borders.

Computed once a forward and read by every layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionMask:
    """The mask of one forward of T new tokens after S - T cached ones."""

    is_causal: bool = True
    """Without `allowed`: a query attends to the keys of its row up to its own; false: to all of them."""
    allowed: Tensor | None = None
    """(B or 1, 1, T, S) bool, true where a query may attend to a key."""


def causal_mask(num_new: int, num_read: int, attention_mask: Tensor | None, device: torch.device) -> AttentionMask:
    """The mask of `num_new` tokens after `num_read` cached ones.

    `attention_mask` (B, num_read + num_new), 1 for a token and 0 for padding, or None where there is no padding.
    A padding query attends to itself, so that no row of scores is empty.
    """
    if attention_mask is None and num_new == 1:
        return AttentionMask(is_causal=False)
    if attention_mask is None and num_read == 0:
        return AttentionMask()
    queries = torch.arange(num_read, num_read + num_new, device=device)[:, None]
    keys = torch.arange(num_read + num_new, device=device)
    causal = keys <= queries  # (T, S)
    if attention_mask is None:
        return AttentionMask(is_causal=False, allowed=causal[None, None])
    allowed = causal & attention_mask.bool()[:, None] | (keys == queries)  # (B, T, S)
    return AttentionMask(is_causal=False, allowed=allowed[:, None])


def document_mask(cu_seqlens: Tensor, shape: torch.Size) -> AttentionMask:
    """Causal inside the segments of `cu_seqlens`, borders over the flat tokens of `shape` (B, T)."""
    segments = segment_ids(cu_seqlens, shape.numel()).view(shape)
    same = segments[:, :, None] == segments[:, None]  # (B, T, T)
    return AttentionMask(is_causal=False, allowed=same.tril()[:, None])


def segment_ids(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The number of the segment each of the flat tokens belongs to, (num_tokens,) int64."""
    tokens = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(tokens, cu_seqlens[1:], right=True)


def segment_positions(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The position of each flat token inside its segment, (num_tokens,) int64."""
    starts = cu_seqlens[segment_ids(cu_seqlens, num_tokens)]
    return torch.arange(num_tokens, device=cu_seqlens.device) - starts
