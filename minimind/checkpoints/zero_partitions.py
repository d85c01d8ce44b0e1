"""Whole tensors of one engine, by its own names, from the partitions that its ranks saved.

ZeRO cuts parameters and optimizer state into flat pieces; they are joined one tensor at a time from mapped files.
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


class EngineTensors(abc.ABC):
    """What the ranks that share every one of these tensors hold together.

    Args:
        shapes: of the parameters, by name.
        optimizers: of each rank, torch's `state_dict` of the optimizer.
        scaler: DeepSpeed's state with the loss scale of fp16, if there is one.
    """

    def __init__(
        self, shapes: Shapes, optimizers: Sequence[Mapping[str, Any]], scaler: Mapping[str, Any] | None = None
    ) -> None:
        self.shapes, self._states = shapes, [optimizer["state"] for optimizer in optimizers]
        self.scalars: dict[str, float] = {}
        """What the optimizer counts, alike for all parameters (`step`; one of its kinds may not count at all)."""
        for state in self._states[0].values():
            numbers = {key: float(value) for key, value in state.items() if not _is_tensor(value)}
            self.scalars = {key: max(value, self.scalars.get(key, value)) for key, value in numbers.items()}
        self.group_settings = [
            {key: group[key] for key in SCHEDULED if key in group} for group in optimizers[0].get("param_groups", ())
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
        state = self._states[0].get(self.number_of(name), {})
        return tuple(key for key, value in state.items() if _is_tensor(value))

    @abc.abstractmethod
    def read(self, name: str, key: str) -> torch.Tensor:
        """A parameter's weight or a tensor of its optimizer state: float32, of the parameter's shape."""


class WholeTensors(EngineTensors):
    """Stage 0: every rank has everything, and the optimizer numbers the parameters group by group.

    Args:
        names: of the parameters, in the order of those numbers.
        read_weight: gives a parameter's weight.
    """

    def __init__(
        self, names: Sequence[str], optimizer: Mapping[str, Any], read_weight: Callable[[str], torch.Tensor]
    ) -> None:
        super().__init__({name: tuple(read_weight(name).shape) for name in names}, [optimizer])
        numbers = itertools.chain.from_iterable(group["params"] for group in optimizer["param_groups"])
        self._numbers = dict(zip(names, numbers, strict=True))
        self._read_weight = read_weight

    def number_of(self, name: str) -> int:
        """As `EngineTensors`."""
        return self._numbers[name]

    def read(self, name: str, key: str) -> torch.Tensor:
        """As `EngineTensors`."""
        return (self._read_weight(name) if key == WEIGHT else self._states[0][self._numbers[name]][key]).float()


class FlatTensors(EngineTensors):
    """Stages 1 and 2: each group of parameters is one flat vector, cut into equal pieces over the ranks.

    Args:
        groups: shape of each parameter of each group, in the order of the vectors.
        ranks: `optimizer_state_dict` of each rank.
    """

    def __init__(self, groups: Sequence[Shapes], ranks: Sequence[Mapping[str, Any]]) -> None:
        shapes = {name: tuple(shape) for group in groups for name, shape in group.items()}
        super().__init__(shapes, [rank["base_optimizer_state"] for rank in ranks], ranks[0])
        self._places: dict[str, tuple[int, int]] = {}
        paddings = ranks[0].get("param_alignment_paddings")
        for number, group in enumerate(groups):
            start = 0
            for place, (name, shape) in enumerate(group.items()):
                self._places[name] = (number, start)
                # Padding between parameters is part of the vector; the padding at its end no parameter reaches.
                start += math.prod(shape) + (paddings[number][place] if paddings else 0)
        self._weights = [rank["single_partition_of_fp32_groups"] for rank in ranks]

    def number_of(self, name: str) -> int:
        """As `EngineTensors`."""
        return self._places[name][0]

    def read(self, name: str, key: str) -> torch.Tensor:
        """As `EngineTensors`."""
        group, start = self._places[name]
        shape = self.shapes[name]
        if key == WEIGHT:
            pieces = [weights[group] for weights in self._weights]
        else:
            pieces = [states[group][key] for states in self._states]
        return cut(pieces, start, math.prod(shape)).view(shape).float()


class SplitTensors(EngineTensors):
    """Stage 3: each parameter is cut into equal pieces over the ranks that share it; a rank's pieces follow each other.

    Args:
        groups: shape of each parameter of each sub-group, in the order of the pieces.
        ranks: `optimizer_state_dict` of each rank that shares the parameters which are read.
        count_ranks: over how many ranks a parameter is cut.
    """

    def __init__(
        self, groups: Sequence[Shapes], ranks: Sequence[Mapping[str, Any]], count_ranks: Callable[[str], int]
    ) -> None:
        shapes = {name: tuple(shape) for group in groups for name, shape in group.items()}
        super().__init__(shapes, [rank["optimizer_state_dict"] for rank in ranks], ranks[0])
        self._weights = [rank["fp32_flat_groups"] for rank in ranks]
        self._places: dict[str, tuple[int, int, int]] = {}
        number = start = 0
        for name, shape in self.shapes.items():
            length = -(-math.prod(shape) // count_ranks(name))
            if start >= self._weights[0][number].numel():
                number, start = number + 1, 0
            self._places[name] = (number, start, length)
            start += length

    def number_of(self, name: str) -> int:
        """As `EngineTensors`: that of the sub-group."""
        return sorted(self._states[0])[self._places[name][0]] if self._states[0] else 0

    def read(self, name: str, key: str) -> torch.Tensor:
        """As `EngineTensors`."""
        group, start, length = self._places[name]
        shape = self.shapes[name]
        if key == WEIGHT:
            pieces = [weights[group] for weights in self._weights]
        else:
            pieces = [state[self.number_of(name)][key] for state in self._states]
        whole = torch.cat([cut([piece], start, length) for piece in pieces])
        return whole[: math.prod(shape)].view(shape).float()


def cut(pieces: Sequence[torch.Tensor], start: int, length: int) -> torch.Tensor:
    """`length` elements from `start` on of the pieces laid end to end; a copy only where they cross a border."""
    found = []
    for piece in pieces:
        size = piece.numel()
        if start < size and length:
            taken = min(length, size - start)
            found.append(piece.view(-1)[start : start + taken])
            length -= taken
            start = 0
        else:
            start = max(0, start - size)
    if length:
        raise IndexError(f"the pieces end {length} elements too early")
    return found[0] if len(found) == 1 else torch.cat(found)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0
