"""Which keys each query of one forward may see: causality, padding, tokens read before, and document borders.

Worked out once a forward and read by every layer. Chooses, by device, the form that skips the most work; refuses to
know of heads, weights or scores.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Documents are gathered by length, rounded up to this many tokens, so that short ones share one kernel call.
_LENGTH_STEP = 64


@dataclass(frozen=True)
class Visibility:
    """The answer for one forward of T new tokens on S - T read ones. At most one of the last three is set.

    Without any of them a query sees its own row's keys: all up to itself if `is_causal`, else all.
    """

    is_causal: bool = True
    mask: Tensor | None = None
    """(B or 1, 1, T, S) bool, true where a query sees a key."""
    cu_seqlens: Tensor | None = None
    """(num_segments + 1,) int32 on CUDA: borders of documents for the variable-length kernel."""
    segment_groups: "SegmentGroups | None" = None
    """Documents gathered into batches of equal length."""


@dataclass(frozen=True)
class SegmentGroups:
    """Documents of similar length side by side, padded behind their ends: under causality nothing sees the padding."""

    batches: tuple[Tensor, ...]
    """For each padded length L, (num_documents, L) int64: where in the B*T flat tokens each row's tokens stand."""
    inverse: Tensor
    """(B*T,) int64: where each flat token stands among the batches' rows, flattened and laid one behind the other."""


def causal(num_new: int, num_read: int, attention_mask: Tensor | None, device: torch.device) -> Visibility:
    """Visibility of `num_new` tokens behind `num_read` ones.

    `attention_mask` (B, num_read + num_new), 1 for a token and 0 for padding, or None where there is no padding.
    A padding query sees itself, so that no row of scores is empty.
    """
    if attention_mask is None and num_new == 1:
        return Visibility(is_causal=False)
    if attention_mask is None and num_read == 0:
        return Visibility()
    queries = torch.arange(num_read, num_read + num_new, device=device)[:, None]
    keys = torch.arange(num_read + num_new, device=device)
    mask = keys <= queries  # (T, S)
    if attention_mask is None:
        return Visibility(is_causal=False, mask=mask[None, None])
    visible = mask & attention_mask.bool()[:, None] | (keys == queries)  # (B, T, S)
    return Visibility(is_causal=False, mask=visible[:, None])


def within_documents(cu_seqlens: Tensor, input_ids: Tensor, kernel: bool) -> Visibility:
    """Causal visibility inside the segments of `cu_seqlens`, borders over the B*T tokens of (B, T) `input_ids`.

    `kernel`: the attention can use torch's variable-length kernel (CUDA) or batches of documents (CPU); else the answer
    is a mask.
    """
    if kernel and cu_seqlens.is_cuda:
        return Visibility(cu_seqlens=cu_seqlens.to(torch.int32))
    if kernel and cu_seqlens.device.type == "cpu":
        return Visibility(segment_groups=group_segments(cu_seqlens))
    segments = segment_ids(cu_seqlens, input_ids.numel()).view(input_ids.shape)
    same = segments[:, :, None] == segments[:, None]  # (B, T, T)
    return Visibility(is_causal=False, mask=same.tril()[:, None])


def segment_ids(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The number of the segment each of the flat tokens belongs to, (num_tokens,) int64."""
    tokens = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(tokens, cu_seqlens[1:], right=True)


def segment_positions(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The position of each flat token inside its segment, (num_tokens,) int64."""
    starts = cu_seqlens[segment_ids(cu_seqlens, num_tokens)]
    return torch.arange(num_tokens, device=cu_seqlens.device) - starts


# The documents' lengths decide the shapes: a compiled model steps out of its graph here, and where the groups are used.
@torch.compiler.disable
def group_segments(cu_seqlens: Tensor) -> SegmentGroups:
    """Sort the segments into batches by length, rounded up to a step, so that little of a batch is padding."""
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens.diff().long()
    padded_lengths = (lengths + _LENGTH_STEP - 1) // _LENGTH_STEP * _LENGTH_STEP
    inverse = torch.empty(int(cu_seqlens[-1]), dtype=torch.long)
    batches, filled = [], 0
    for padded_length in padded_lengths.unique().tolist():
        members = (padded_lengths == padded_length).nonzero()  # (num_documents, 1)
        width = int(lengths[members].max())
        offsets = torch.arange(width)
        real = offsets < lengths[members]  # (num_documents, width)
        # Padding repeats the document's first token: any token will do, nothing reads what comes of it.
        tokens = starts[members] + offsets * real
        inverse[tokens[real]] = filled + torch.arange(tokens.numel()).view_as(tokens)[real]
        batches.append(tokens)
        filled += tokens.numel()
    return SegmentGroups(tuple(batches), inverse)
