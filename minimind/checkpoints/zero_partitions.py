"""Tensors of one engine, whole or in part, by its own names, from the partitions that its ranks saved.

ZeRO cuts parameters and optimizer state into flat pieces. A rank's file is opened when something of it is first read,
and mapped: no more is read than is asked for.
"""

import abc
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

WEIGHT = "fp32"
"""The key of the float32 weights, beside those of the optimizer's state (`exp_avg`, `exp_avg_sq`)."""

SCHEDULED = ("lr", "betas", "momentum")
"""Settings of a group of parameters that a scheduler moves."""

Shapes = Mapping[str, Sequence[int]]
States = Callable[[], Mapping[str, Any]]
"""Opens what a rank saved."""


class EngineTensors(abc.ABC):
    """What the ranks that share every one of these tensors hold together.

    Args:
        shapes: of the parameters, by name.
        optimizer: of the first rank, torch's `state_dict` of the optimizer.
        scaler: DeepSpeed's state with the loss scale of fp16, if there is one.
    """

    def __init__(self, shapes: Shapes, optimizer: Mapping[str, Any], scaler: Mapping[str, Any] | None = None) -> None:
        self.shapes, self._state = shapes, optimizer["state"]
        self.scalars: dict[str, float] = {}
        """What the optimizer counts, alike for all parameters (`step`; one of its kinds may not count at all)."""
        for state in self._state.values():
            numbers = {key: float(value) for key, value in state.items() if not _is_tensor(value)}
            self.scalars = {key: max(value, self.scalars.get(key, value)) for key, value in numbers.items()}
        self.group_settings = [
            {key: group[key] for key in SCHEDULED if key in group} for group in optimizer.get("param_groups", ())
        ]
        """What a scheduler may have changed in each group of parameters."""
        self.loss_scaler: dict[str, Any] | None = None
        """Attributes of fp16's dynamic loss scale, or None where there is none."""
        if scaler is not None and scaler.get("loss_scaler") is not None and scaler.get("dynamic_loss_scale"):
            values = vars(scaler["loss_scaler"])
            self.loss_scaler = {name: value for name, value in values.items() if isinstance(value, (bool, int, float))}

    @abc.abstractmethod
    def number_of(self, name: str) -> int:
        """The optimizer's number of what a parameter is (a part of)."""

    def state_keys(self, name: str) -> tuple[str, ...]:
        """What the optimizer keeps of a parameter beside its weight, as large as it (a step count is not)."""
        state = self._state.get(self.number_of(name), {})
        return tuple(key for key, value in state.items() if _is_tensor(value))

    def read(self, name: str, key: str) -> torch.Tensor:
        """A parameter's weight or a tensor of its optimizer state: float32, of the parameter's shape."""
        shape = self.shapes[name]
        return self.read_range(name, key, 0, math.prod(shape)).view(shape)

    @abc.abstractmethod
    def read_range(self, name: str, key: str, start: int, stop: int) -> torch.Tensor:
        """The elements from `start` to `stop` of what `read` gives, laid flat."""


class WholeTensors(EngineTensors):
    """Stage 0: every rank has everything, and the optimizer numbers the parameters group by group.

    Args:
        names: of the parameters, in the order of those numbers.
        read_weight: gives a parameter's weight.
    """

    def __init__(
        self, names: Sequence[str], optimizer: Mapping[str, Any], read_weight: Callable[[str], torch.Tensor]
    ) -> None:
        super().__init__({name: tuple(read_weight(name).shape) for name in names}, optimizer)
        numbers = itertools.chain.from_iterable(group["params"] for group in optimizer["param_groups"])
        self._numbers = dict(zip(names, numbers, strict=True))
        self._read_weight = read_weight

    def number_of(self, name: str) -> int:
        """As `EngineTensors`."""
        return self._numbers[name]

    def read_range(self, name: str, key: str, start: int, stop: int) -> torch.Tensor:
        """As `EngineTensors`."""
        whole = self._read_weight(name) if key == WEIGHT else self._state[self._numbers[name]][key]
        return whole.reshape(-1)[start:stop].float()


class FlatTensors(EngineTensors):
    """Stages 1 and 2: each group of parameters is one flat vector, cut into equal pieces over the ranks.

    Args:
        groups: shape of each parameter of each group, in the order of the vectors.
        ranks: `optimizer_state_dict` of each rank.
    """

    def __init__(self, groups: Sequence[Shapes], ranks: Sequence[States]) -> None:
        shapes = {name: tuple(shape) for group in groups for name, shape in group.items()}
        first = ranks[0]()
        super().__init__(shapes, first["base_optimizer_state"], first)
        self._places: dict[str, tuple[int, int]] = {}
        paddings = first.get("param_alignment_paddings")
        for number, group in enumerate(groups):
            start = 0
            for place, (name, shape) in enumerate(group.items()):
                self._places[name] = (number, start)
                # Padding between parameters is part of the vector; the padding at its end no parameter reaches.
                start += math.prod(shape) + (paddings[number][place] if paddings else 0)
        self._ranks = ranks
        self._sizes = [weights.numel() for weights in first["single_partition_of_fp32_groups"]]

    def number_of(self, name: str) -> int:
        """As `EngineTensors`."""
        return self._places[name][0]

    def read_range(self, name: str, key: str, start: int, stop: int) -> torch.Tensor:
        """As `EngineTensors`."""
        group, place = self._places[name]

        def piece(rank: int) -> torch.Tensor:
            states = self._ranks[rank]()
            if key == WEIGHT:
                return states["single_partition_of_fp32_groups"][group]
            return states["base_optimizer_state"]["state"][group][key]

        return read_cut(piece, self._sizes[group], 0, place + start, place + stop)


class SplitTensors(EngineTensors):
    """Stage 3: each parameter is cut into equal pieces over the ranks that share it; a rank's pieces follow each other.

    Args:
        groups: shape of each parameter of each sub-group, in the order of the pieces.
        ranks: `optimizer_state_dict` of each rank that shares the parameters which are read.
        count_ranks: over how many ranks a parameter is cut.
    """

    def __init__(self, groups: Sequence[Shapes], ranks: Sequence[States], count_ranks: Callable[[str], int]) -> None:
        shapes = {name: tuple(shape) for group in groups for name, shape in group.items()}
        first = ranks[0]()
        super().__init__(shapes, first["optimizer_state_dict"], first)
        self._ranks, sizes = ranks, [weights.numel() for weights in first["fp32_flat_groups"]]
        self._places: dict[str, tuple[int, int, int]] = {}
        number = start = 0
        for name, shape in self.shapes.items():
            length = -(-math.prod(shape) // count_ranks(name))
            if start >= sizes[number]:
                number, start = number + 1, 0
            self._places[name] = (number, start, length)
            start += length

    def number_of(self, name: str) -> int:
        """As `EngineTensors`: that of the sub-group."""
        return sorted(self._state)[self._places[name][0]] if self._state else 0

    def read_range(self, name: str, key: str, start: int, stop: int) -> torch.Tensor:
        """As `EngineTensors`."""
        group, place, length = self._places[name]

        def piece(rank: int) -> torch.Tensor:
            states = self._ranks[rank]()
            if key == WEIGHT:
                return states["fp32_flat_groups"][group]
            return states["optimizer_state_dict"]["state"][self.number_of(name)][key]

        return read_cut(piece, length, place, start, stop)


def read_cut(piece: Callable[[int], torch.Tensor], size: int, place: int, start: int, stop: int) -> torch.Tensor:
    """The elements from `start` to `stop` of a vector that is cut over ranks, as float32; a copy only where they cross
    a border.

    Args:
        piece: what a rank holds of this vector and others; asked for only of ranks that hold some of the elements.
        size: of each rank's part of the vector, which begins at `place` of its piece.
    """
    found = []
    while start < stop:
        rank, first = divmod(start, size)
        taken = min(size - first, stop - start)
        found.append(piece(rank).view(-1).narrow(0, place + first, taken))
        start += taken
    return (found[0] if len(found) == 1 else torch.cat(found)).float()


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0
