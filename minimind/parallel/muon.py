"""Muon for matrices beside AdamW for the rest: one optimizer, the same arithmetic in every ZeRO stage.

ZeRO gives an optimizer flat partitions, and Muon needs whole matrices. A matrix that the partitions cut is put together
on one of the ranks that share it, orthogonalised there, and sent back; all else is elementwise and stays where it is.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import Tensor

from minimind.config.tensor_parallel import cut_dimension

MUON = "muon"
"""The `kind` of a parameter group that Muon updates."""
MOMENTUM = "momentum_buffer"
BUCKET_ELEMENTS = 2**26
"""Matrices that are exchanged, or orthogonalised in one product, have together about so many elements at most."""
# Each step of the iteration takes a singular value s to a s + b s^3 + c s^5: steep at 0, and near 1 after five steps.
_COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 5


class Piece(NamedTuple):
    """What a rank's partition holds of a matrix."""

    shape: tuple[int, int]
    start: int
    """Where in the partition."""
    offset: int
    """The first of the matrix's elements that is here."""
    length: int
    """How many are here; 0: none."""
    is_cut: bool
    """Other ranks hold others."""
    shared: int | None = None
    """The dimension along which a tensor group shares it: then this is a matrix of its own, and a part of the whole."""


class Place(NamedTuple):
    """Where a matrix that is cut is put together."""

    piece: Piece
    owner: int
    """Rank in the group that shares it."""
    start: int
    """Where in that rank's part of the bucket."""


class Layout(NamedTuple):
    """The matrices of one flat partition. `buckets` is alike on all ranks of `group` but for the pieces."""

    whole: list[Piece]
    buckets: list[list[Place]]
    group: dist.ProcessGroup | None


class Muon(torch.optim.AdamW):
    """Muon (arXiv 2502.16982) for the groups whose `kind` is `MUON`, torch's fused AdamW for the others.

    The momentum of a matrix (Nesterov's) is replaced by the nearest matrix whose singular values are all alike, times
    sqrt(max(1, rows / columns)): a rate that means the same at every width (arXiv 2310.17813).

    Args:
        groups: parameter groups; each says `kind`, and Muon's say `momentum`.
        device: where matrices are orthogonalised; under offload not where the partitions are.
        dtype: what in; bfloat16 is enough (arXiv 2502.16982).
    """

    def __init__(self, groups: list[dict[str, Any]], *, device: torch.device, dtype: torch.dtype, **adamw: Any) -> None:
        super().__init__(groups, fused=True, **adamw)
        self.device, self.dtype = device, dtype
        self.tensor_group: dist.ProcessGroup | None = None
        self.layouts: dict[Tensor, Layout] = {}
        """Of ZeRO's partitions; a parameter without one is a matrix, or several along its first dimension."""
        self._step_supports_amp_scaling = False  # torch's scaler leaves a bad step out itself

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update. Every rank calls this. With `found_inf` set (a tensor, not 0) nothing changes."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["kind"] != MUON]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["kind"] == MUON:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update({"step": torch.zeros((), device=parameter.device), MOMENTUM: torch.zeros_like(parameter)})
        momentum, grad, keep = state[MOMENTUM], parameter.grad, 1.0
        assert grad is not None
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None:  # on the device: the host does not wait for it
            grad, keep = grad.where(found_inf == 0, 0), 1 - found_inf
        state["step"] += keep
        momentum.lerp_(grad, (1 - group["momentum"]) * keep)
        update = grad.lerp(momentum, group["momentum"])
        layout = self.layouts.get(parameter) or Layout(_whole(parameter), [], None)
        self._orthogonalize(update.view(-1), layout)
        parameter.mul_(1 - group["lr"] * group["weight_decay"] * keep)
        parameter.sub_(update * (group["lr"] * keep))

    def _orthogonalize(self, update: Tensor, layout: Layout) -> None:
        """Every matrix of a flat partition, in place. Every rank of its group calls this."""
        matrices = [_part(update, piece).view(piece.shape) for piece in layout.whole]
        self._orthogonalize_each(matrices, layout.whole)
        for bucket in layout.buckets:
            self._exchange(update, bucket, layout.group)

    def _exchange(self, update: Tensor, bucket: list[Place], group: dist.ProcessGroup | None) -> None:
        """Matrices that are cut: to their owners and back. Every rank of the group calls this."""
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        length = max(place.start + math.prod(place.piece.shape) for place in bucket)
        rows = torch.zeros(size, length, dtype=self.dtype, device=self.device)
        here = [(_part(update, place.piece), _part(rows[place.owner], place)) for place in bucket]
        for own, sent in here:
            sent.copy_(own)
        row = rows.new_empty(length)
        dist.reduce_scatter_tensor(row, rows.view(-1), group=group)  # of each element all but one rank sends zero
        places = [place for place in bucket if place.owner == rank]
        owned = [row[at.start :][: math.prod(at.piece.shape)].view(at.piece.shape) for at in places]
        self._orthogonalize_each(owned, [place.piece for place in places])
        dist.all_gather_into_tensor(rows.view(-1), row, group=group)
        for own, sent in here:
            own.copy_(sent)

    def _orthogonalize_each(self, matrices: Sequence[Tensor], pieces: Sequence[Piece]) -> None:
        """In place; matrices of one shape in one product. The ranks of a tensor group call this with their parts of the
        same matrices."""
        alike: defaultdict[tuple[torch.Size, int | None], list[Tensor]] = defaultdict(list)
        for matrix, piece in zip(matrices, pieces, strict=True):
            alike[matrix.shape, piece.shared].append(matrix)
        for (shape, shared), same in alike.items():
            count = max(1, BUCKET_ELEMENTS // shape.numel())
            for first in range(0, len(same), count):
                some = same[first : first + count]
                stack = torch.stack([matrix.to(self.device, self.dtype) for matrix in some])
                for matrix, found in zip(some, self._orthogonalize_whole(stack, shared), strict=True):
                    matrix.copy_(found)

    def _orthogonalize_whole(self, parts: Tensor, shared: int | None) -> Tensor:
        """`orthogonalize` of the matrices of which this rank has (N, rows, columns) `parts`: its parts of the outcome.
        Each rank computes all of it."""
        if shared is None:
            return orthogonalize(parts)
        rank, size = dist.get_rank(self.tensor_group), dist.get_world_size(self.tensor_group)
        found = [torch.empty_like(parts) for _ in range(size)]
        dist.all_gather(found, parts, group=self.tensor_group)
        return orthogonalize(torch.cat(found, dim=shared - 2)).chunk(size, dim=shared - 2)[rank]


ZERO_SUPPORTED_OPTIMIZERS.append(Muon)  # DeepSpeed warns of others


def _part(vector: Tensor, of: Piece | Place) -> Tensor:
    """The elements of a piece, in its partition or where its matrix is put together."""
    start, piece = (of.start, of) if isinstance(of, Piece) else (of.start + of.piece.offset, of.piece)
    return vector[start : start + piece.length]


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest matrices with equal singular values: about 1 (0.7 to 1.2) times sqrt(max(1, rows / columns)).

    Newton and Schulz's iteration, five steps of a polynomial of degree five. (N, rows, columns) -> the same shape and
    type; zero stays zero.
    """
    rows, columns = matrices.shape[-2:]
    found = matrices.mT if rows > columns else matrices
    found = found / (found.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if matrices.dtype == torch.float32 and found.shape[-1] > 1.5 * found.shape[-2]:
        found = _iterate_gram(found @ found.mT) @ found
    else:
        for a, b, c in _COEFFICIENTS:
            gram = found @ found.mT
            found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    found = found * math.sqrt(max(1.0, rows / columns))
    return found.mT if rows > columns else found


def _iterate_gram(gram: Tensor) -> Tensor:
    """The product of all steps, from X X^T alone: fewer operations where X is wide, but its squares need float32."""
    step: Tensor | None = None
    product: Tensor | None = None
    for a, b, c in _COEFFICIENTS:
        if step is not None:
            gram = step @ gram @ step
        step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # all of these are symmetric and commute
        step.diagonal(dim1=-2, dim2=-1).add_(a)
        product = step if product is None else step @ product
    assert product is not None
    return product


def attach_layouts(engine: deepspeed.DeepSpeedEngine, optimizer: Muon, tensor_group: dist.ProcessGroup | None) -> None:
    """Tell the optimizer where ZeRO has put its matrices, from what the stages call their partitions, and which of them
    are parts that a tensor group shares."""
    zero, optimizer.tensor_group = engine.optimizer, tensor_group

    def shared(parameter: Any) -> int | None:
        return None if tensor_group is None else cut_dimension(engine.param_names[parameter])

    if hasattr(zero, "fp16_groups") and hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3
        for number, partition in enumerate(zero.fp32_partitioned_groups_flat):
            parameters = zero.fp16_groups[number]
            if optimizer.param_groups[zero.sub_group_to_group_id[number]]["kind"] == MUON:
                group = parameters[0].ds_process_group
                optimizer.layouts[partition] = _layout(_split_pieces(parameters, dist.get_rank(group), shared), group)
        return
    if hasattr(zero, "single_partition_of_fp32_groups"):  # stages 1 and 2
        partitions, names = zero.single_partition_of_fp32_groups, zero.round_robin_bit16_groups
        offsets = zero.round_robin_bit16_offsets
    elif hasattr(zero, "fp32_groups_flat_partition"):  # stage 1, bf16 with float32 gradients
        partitions, names = zero.fp32_groups_flat_partition, zero.bf16_groups
        offsets = [list(itertools.accumulate((p.numel() for p in group), initial=0))[:-1] for group in names]
    else:  # stage 0
        for own in optimizer.param_groups:
            for parameter in own["params"] if own["kind"] == MUON else ():
                optimizer.layouts[parameter] = Layout(_whole(parameter, shared(parameter)), [], None)
        return
    for number, partition in enumerate(partitions):
        if optimizer.param_groups[number]["kind"] == MUON:
            group, length = zero.real_dp_process_group[number], partition.numel()
            rank = dist.get_rank(group)
            pieces = [
                piece
                for parameter, begin in zip(names[number], offsets[number], strict=True)
                for piece in _pieces(parameter.shape, begin, length, rank, -rank * length, shared(parameter))
            ]
            optimizer.layouts[partition] = _layout(pieces, group)


def _split_pieces(parameters: Sequence[Any], rank: int, shared: Callable[[Any], int | None]) -> list[Piece]:
    """Stage 3: each parameter is cut into equal parts, and a rank's parts follow each other."""
    pieces: list[Piece] = []
    start = 0
    for parameter in parameters:
        length = parameter.ds_tensor.ds_numel
        pieces += _pieces(parameter.ds_shape, 0, length, rank, start - rank * length, shared(parameter))
        start += length
    return pieces


def _pieces(
    shape: Sequence[int], begin: int, length: int, rank: int, shift: int, shared: int | None = None
) -> Iterator[Piece]:
    """The matrices of a parameter that begins at `begin` of a vector of which each rank has `length` elements.

    Args:
        shift: from a place in that vector to the same in the rank's partition.
    """
    size = shape[-2] * shape[-1]
    for number in range(math.prod(shape) // size):
        first = begin + number * size
        low, high = max(first, rank * length), min(first + size, (rank + 1) * length)
        is_cut = first // length != (first + size - 1) // length
        yield Piece((shape[-2], shape[-1]), low + shift, low - first, max(0, high - low), is_cut, shared)


def _whole(parameter: Tensor, shared: int | None = None) -> list[Piece]:
    return list(_pieces(parameter.shape, 0, parameter.numel(), 0, 0, shared))


def _layout(pieces: Sequence[Piece], group: dist.ProcessGroup) -> Layout:
    """Bring those that are cut into buckets, and give the ranks about the same work in each."""
    whole = [piece for piece in pieces if not piece.is_cut and piece.length]
    buckets: list[list[Piece]] = [[]]
    elements = 0
    for piece in pieces:
        if piece.is_cut:
            if elements > BUCKET_ELEMENTS:
                buckets.append([])
                elements = 0
            buckets[-1].append(piece)
            elements += math.prod(piece.shape)
    return Layout(whole, [_places(bucket, dist.get_world_size(group)) for bucket in buckets if bucket], group)


def _places(bucket: Sequence[Piece], num_ranks: int) -> list[Place]:
    filled = [0] * num_ranks
    places = []
    for piece in sorted(bucket, key=lambda piece: -math.prod(piece.shape)):
        owner = filled.index(min(filled))
        places.append(Place(piece, owner, filled[owner]))
        filled[owner] += math.prod(piece.shape)
    return places
