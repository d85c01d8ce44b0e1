"""Sequence parallelism (DeepSpeed-Ulysses, arXiv 2309.14509), applied to a built model from outside.

The ranks of a sequence group have the same rows, each T / sp_size neighbouring tokens of every row. Only attention sees
other tokens: before it ranks exchange tokens for heads, so that each has whole rows of some heads, and after it heads
for tokens. Knows nothing of steps, batches and checkpoints.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from minimind.model.attention import Attention
from minimind.model.attention_mask import AttentionMask
from minimind.model.transformer import MiniMindModel
from minimind.parallel.mesh import Mesh


def share_sequences(model: nn.Module, mesh: Mesh) -> None:
    """Let the ranks of a sequence group exchange tokens for heads around every attention in `model`, from now on.

    After `apply_kernels`: the classes of the modules are exchanged, whatever they are.
    """
    if mesh.sequence is None:
        return
    for module in model.modules():
        for base, mixin in ((Attention, SequenceAttention), (MiniMindModel, SequenceModel)):
            if isinstance(module, base):
                module.__class__ = _join(mixin, type(module))  # type: ignore[arg-type]
                module.sequence_group = mesh.sequence  # type: ignore[assignment]


@contextlib.contextmanager
def whole_rows(model: nn.Module) -> Iterator[None]:
    """While this lasts every rank has whole rows, and attention exchanges nothing."""
    modules = [module for module in model.modules() if isinstance(module, SequenceAttention | SequenceModel)]
    groups = [module.sequence_group for module in modules]
    for module in modules:
        module.sequence_group = None
    try:
        yield
    finally:
        for module, group in zip(modules, groups, strict=True):
            module.sequence_group = group


class SequenceAttention(Attention):
    """`Attention` on T / sp_size tokens of every row."""

    sequence_group: ProcessGroup | None

    @torch.compiler.disable  # a compiled block leaves its graph for the collectives
    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: AttentionMask) -> Tensor:
        """As `Attention.attend`, of queries, keys and values (B, heads, T / sp_size, head_size), and the `mask` of
        whole rows."""
        group = self.sequence_group
        if group is None:
            return super().attend(queries, keys, values, mask)
        size = torch.distributed.get_world_size(group)
        repeats = size // math.gcd(keys.shape[1], size)
        if repeats > 1:  # more ranks than key heads divide among: neighbours get the same ones
            keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
        heads = [x.shape[1] // size for x in (queries, keys, values)]
        # What goes to one rank lies together, so that one message carries all three: (sp, B, its heads, t, D).
        parts = torch.cat([x.unflatten(1, (size, -1)) for x in (queries, keys, values)], dim=2)
        parts = _Exchange.apply(parts.transpose(0, 1), group)  # dimension 0: part of the sequence
        rows = parts.permute(1, 2, 0, 3, 4).flatten(2, 3)  # (B, own heads, T, D)
        queries, keys, values = rows.split(heads, dim=1)
        mixed = super().attend(queries, keys, values, mask)  # (B, num_heads / sp, T, D)
        mixed = _Exchange.apply(mixed.unflatten(2, (size, -1)).permute(2, 0, 1, 3, 4), group)  # dimension 0: heads
        return mixed.transpose(0, 1).flatten(1, 2)  # (B, num_heads, t, D)


class SequenceModel(MiniMindModel):
    """`MiniMindModel` on T / sp_size tokens of every row; document borders are those of whole rows."""

    sequence_group: ProcessGroup | None

    def document_mask(self, cu_seqlens: Tensor, hidden_states: Tensor) -> AttentionMask:
        """As `MiniMindModel.document_mask`, for whole rows."""
        if self.sequence_group is not None:
            length = hidden_states.shape[1] * torch.distributed.get_world_size(self.sequence_group)
            hidden_states = hidden_states[:, :1].expand(-1, length, -1)  # a view: it is asked for its shape alone
        return super().document_mask(cu_seqlens, hidden_states)


@functools.cache
def _join(mixin: Any, kind: Any) -> Any:
    return type(f"Sequence{kind.__name__}", (mixin, kind), {})


class _Exchange(torch.autograd.Function):
    """Rank i's part j of dimension 0 becomes rank j's part i. Its own inverse, and so its own gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        received = torch.empty_like(x)
        torch.distributed.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(grad_outputs[0], ctx.group), None
