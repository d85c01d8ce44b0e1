"""Attention by what is fastest on the device: inside documents without a mask, and on a CPU in 16 bit.

Documents: torch's variable-length kernel on a GPU, batches of documents of similar length on a CPU. In 16 bit on a
CPU: short rows by matrix products, everything in float32 on a processor without 16-bit products.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from minimind.model.attention import Attention
from minimind.model.attention_mask import AttentionMask
from minimind.model.kernels.matmul import upcasts_to_fp32
from minimind.model.transformer import MiniMindModel

# torch 2.10 to 2.13 spell causality and grouped heads in different ways.
_PARAMETERS = inspect.signature(varlen_attn).parameters
_VARLEN_OPTIONS: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in _PARAMETERS else {"is_causal": True}
if "enable_gqa" in _PARAMETERS:
    _VARLEN_OPTIONS["enable_gqa"] = True

LONGEST_BY_MATMUL = 1024
"""Tokens of the longest causal rows that are computed by matrix products on a CPU in 16 bit. Measured on AVX512-BF16
(one thread, forward and backward, against torch's fused kernel): 5.7x at 32 tokens, 3x at 192, 2.2x at 512. Longer
rows would keep too large score matrices for the backward pass."""

QUERY_BLOCK = 256
"""Queries in one product: of longer rows up to half of the scores are never computed. Beside one product for whole rows
(AMX, two threads, forward and backward): 1.3x at 340 tokens, 1.4x at 512, 1.7x at 1024."""

# Documents are batched by length, rounded up to this many tokens, so that short ones share one kernel call.
_LENGTH_STEP = 64


@dataclass(frozen=True)
class DocumentMask(AttentionMask):
    """Causal inside documents, in the form that the variable-length kernel takes or, without `cu_seqlens`, as batches
    of documents of similar length, padded at their ends: under causality nothing attends to the padding."""

    cu_seqlens: Tensor | None = None
    """(num_segments + 1,) int32."""
    batches: tuple[Tensor, ...] = ()
    """For each padded length L, (num_documents, L) int64: places of the rows' tokens among the B*T flat tokens."""
    inverse: Tensor | None = None
    """(B*T,) int64: the place of each flat token among the rows of all batches, concatenated."""


class FastMiniMindModel(MiniMindModel):
    """`MiniMindModel` whose document masks are `DocumentMask`s where a kernel fits."""

    def document_mask(self, cu_seqlens: Tensor, hidden_states: Tensor) -> AttentionMask:
        """As `MiniMindModel.document_mask`."""
        config, device = self.config, hidden_states.device.type
        if config.flash_attn and device == "cpu":
            return batch_documents(cu_seqlens)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
        fits = dtype in (torch.float16, torch.bfloat16) and config.head_size % 8 == 0 and config.head_size <= 256
        has_dropout = config.attention_dropout and self.training
        if config.flash_attn and has_varlen_attention(hidden_states.device) and fits and not has_dropout:
            return DocumentMask(cu_seqlens=cu_seqlens.to(torch.int32))
        return super().document_mask(cu_seqlens, hidden_states)


class FastAttention(Attention):
    """`Attention` by the kernels of this module."""

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: AttentionMask) -> Tensor:
        """As `Attention.attend`."""
        if isinstance(mask, DocumentMask):
            if mask.cu_seqlens is not None:
                return attend_varlen(queries, keys, values, mask.cu_seqlens)
            return self.attend_batches(queries, keys, values, mask)
        if upcasts_to_fp32(queries[0, 0]):
            with torch.autocast("cpu", enabled=False):
                return super().attend(queries.float(), keys.float(), values.float(), mask).to(queries.dtype)
        if queries.is_cuda and queries.shape[2] == 1 and mask.allowed is not None:
            # One token a row: the queries of a group are rows of one product. With a mask torch's fused kernels have no
            # grouped heads, and keys and values would be repeated in memory.
            grouped = queries.reshape(len(queries), keys.shape[1], -1, queries.shape[3])
            return super().attend(grouped, keys, values, mask).reshape_as(queries)
        is_16_bit_on_cpu = queries.is_cpu and queries.dtype in (torch.bfloat16, torch.float16)
        has_dropout = self.dropout and self.training
        is_short = mask.is_causal and queries.shape[2] <= LONGEST_BY_MATMUL
        if is_16_bit_on_cpu and is_short and self.flash_attn and not has_dropout:
            return attend_by_matmul(queries, keys, values)
        return super().attend(queries, keys, values, mask)

    # The lengths of the documents decide the shapes: a compiled model leaves its graph here and in `batch_documents`.
    @torch.compiler.disable
    def attend_batches(self, queries: Tensor, keys: Tensor, values: Tensor, mask: DocumentMask) -> Tensor:
        """Causal attention inside each document, one call for each batch of documents; shapes as in `attend`."""
        mixed = []
        for tokens in mask.batches:
            own = [_gather(x, tokens) for x in (queries, keys, values)]
            # Not `self.attend`: a subclass may exchange heads with other ranks there, which is done by now.
            gathered = FastAttention.attend(self, own[0], own[1], own[2], AttentionMask())
            mixed.append(gathered.transpose(1, 2).flatten(0, 1))  # (num_documents * L, num_heads, head_size)
        flat = torch.cat(mixed).index_select(0, mask.inverse)  # type: ignore[arg-type]
        return flat.unflatten(0, (len(queries), -1)).transpose(1, 2)


def has_varlen_attention(device: torch.device) -> bool:
    """Whether torch's variable-length kernel runs there: NVIDIA GPUs from sm80 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _gather(x: Tensor, tokens: Tensor) -> Tensor:
    """(B, heads, T, head_size) and (num_documents, L) flat places -> (num_documents, heads, L, head_size)."""
    flat = x.transpose(1, 2).flatten(0, 1)
    return flat.index_select(0, tokens.flatten()).unflatten(0, tokens.shape).transpose(1, 2)


def attend_by_matmul(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention by batched matrix products, `QUERY_BLOCK` queries on the keys up to the last of them at a time;
    scores in the inputs' dtype, softmax in float32."""
    batch_size, num_heads, length, head_size = queries.shape
    num_rows, group = batch_size * keys.shape[1], num_heads // keys.shape[1]
    queries = queries.reshape(num_rows, group, length, head_size)
    keys, values = keys.reshape(num_rows, length, head_size), values.reshape(num_rows, length, head_size)
    mixed = []
    for start in range(0, length, QUERY_BLOCK):
        block = queries[:, :, start : start + QUERY_BLOCK]
        end = start + block.shape[2]
        masked = block.new_full((end - start, end), float("-inf")).triu(start + 1).repeat(group, 1)
        # The queries of a group share their keys. The mask is added within the product: by itself it would read and
        # write all scores once more, and again in backward.
        scores = torch.baddbmm(masked, block.flatten(1, 2), keys[:, :end].transpose(1, 2), alpha=head_size**-0.5)
        mixed.append((scores.softmax(dim=-1) @ values[:, :end]).unflatten(1, (group, -1)))
    return torch.cat(mixed, dim=2).view(batch_size, num_heads, length, head_size)


def attend_varlen(queries: Tensor, keys: Tensor, values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Causal attention inside each segment by the variable-length kernel; shapes as in `Attention.attend`."""
    batch_size, _, longest, _ = queries.shape  # a segment ends with its row; the true maximum would cost a host sync
    queries, keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (queries, keys, values))
    mixed: Any = varlen_attn(queries, keys, values, cu_seqlens, cu_seqlens, longest, longest, **_VARLEN_OPTIONS)
    return mixed.unflatten(0, (batch_size, longest)).transpose(1, 2)


@torch.compiler.disable
def batch_documents(cu_seqlens: Tensor) -> DocumentMask:
    """Sort the segments into batches by length, rounded up to a step, so that little of a batch is padding."""
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens.diff().long()
    padded_lengths = (lengths + _LENGTH_STEP - 1) // _LENGTH_STEP * _LENGTH_STEP
    inverse = torch.empty(int(cu_seqlens[-1]), dtype=torch.long)
    batches, filled = [], 0
    for padded_length in padded_lengths.unique().tolist():
        members = (padded_lengths == padded_length).nonzero()  # (num_documents, 1)
        offsets = torch.arange(int(lengths[members].max()))
        real = offsets < lengths[members]  # (num_documents, width)
        # Padding repeats the first token of its document: any token will do, nothing reads its result.
        tokens = starts[members] + offsets * real
        inverse[tokens[real]] = filled + torch.arange(tokens.numel()).view_as(tokens)[real]
        batches.append(tokens)
        filled += tokens.numel()
    return DocumentMask(batches=tuple(batches), inverse=inverse)
