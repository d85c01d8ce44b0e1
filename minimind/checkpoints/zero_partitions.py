"""Whole tensors of one engine, by its own names, from the partitions that its ranks saved.

ZeRO cuts parameters and optimizer state into flat pieces; they are joined one tensor at a time from mapped files.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

WEIGHT = "fp32"
"""The key of the float32 weights, beside those of the optimizer's state (`exp_avg`, `exp_avg_sq`)."""
MUON_KEY = "momentum_buffer"
"""State that DeepSpeed's Muon keeps for whole tensors, on every rank that holds a part of one."""

Shapes = Mapping[str, Sequence[int]]


class EngineTensors(Protocol):
    """What the ranks that share every one of these tensors hold together."""

    shapes: Shapes
    optimizer_step: float
    loss_scaler: dict[str, Any] | None

    def state_keys(self, name: str) -> tuple[str, ...]:
        """What the optimizer keeps of a parameter beside its weight."""

    def read(self, name: str, key: str) -> torch.Tensor:
        """A parameter's weight or a tensor of its optimizer state: float32, of the parameter's shape."""


class WholeTensors:
    """Stage 0: every rank has everything, and the optimizer numbers the parameters group by group.

    Args:
        names: of the parameters, in the order of those numbers.
        read_weight: gives a parameter's weight.
    """

    def __init__(
        self, names: Sequence[str], optimizer: Mapping[str, Any], read_weight: Callable[[str], torch.Tensor]
    ) -> None:
        numbers = itertools.chain.from_iterable(group["params"] for group in optimizer["param_groups"])
        state = optimizer["state"]
        self._state = {name: state.get(number, {}) for name, number in zip(names, numbers, strict=True)}
        self._read_weight = read_weight
        self.shapes: Shapes = {name: _shape_of(state, read_weight(name)) for name, state in self._state.items()}
        self.optimizer_step = float(self._state[names[0]].get("step", 0))
        self.loss_scaler: dict[str, Any] | None = None

    def state_keys(self, name: str) -> tuple[str, ...]:
        """As `EngineTensors`."""
        return _state_keys(self._state[name])

    def read(self, name: str, key: str) -> torch.Tensor:
        """As `EngineTensors`."""
        return (self._read_weight(name) if key == WEIGHT else self._state[name][key]).float()


class FlatTensors:
    """Stages 1 and 2: each group of parameters is one flat vector, cut into equal pieces over the ranks.

    Args:
        groups: shape of each parameter of each group, in the order of the vectors.
        ranks: `optimizer_state_dict` of each rank.
    """

    def __init__(self, groups: Sequence[Shapes], ranks: Sequence[Mapping[str, Any]]) -> None:
        self.shapes: Shapes = {name: tuple(shape) for group in groups for name, shape in group.items()}
        self._groups = groups
        self._places: dict[str, tuple[int, int]] = {}
        paddings = ranks[0].get("param_alignment_paddings")
        for number, group in enumerate(groups):
            start = 0
            for place, (name, shape) in enumerate(group.items()):
                self._places[name] = (number, start)
                # Padding between parameters is part of the vector; the padding at its end no parameter reaches.
                start += math.prod(shape) + (paddings[number][place] if paddings else 0)
        self._weights = [rank["single_partition_of_fp32_groups"] for rank in ranks]
        self._states = [rank["base_optimizer_state"]["state"] for rank in ranks]
        self.optimizer_step = _first_step(self._states[0])
        self.loss_scaler = _scaler_of(ranks[0])

    def state_keys(self, name: str) -> tuple[str, ...]:
        """As `EngineTensors`."""
        return _state_keys(self._states[0].get(self._places[name][0], {}))

    def read(self, name: str, key: str) -> torch.Tensor:
        """As `EngineTensors`."""
        group, start = self._places[name]
        shape = self.shapes[name]
        if key == WEIGHT:
            pieces = [weights[group] for weights in self._weights]
        elif key == MUON_KEY:
            rank, start = self._find_whole(name)
            pieces = [self._states[rank][group][key]]
        else:
            pieces = [states[group][key] for states in self._states]
        return cut(pieces, start, math.prod(shape)).view(shape).float()

    def _find_whole(self, name: str) -> tuple[int, int]:
        """The first rank whose piece of the vector holds any of a parameter, and where the parameter begins in what
        that rank keeps for whole tensors: those of which it holds any, one after the other."""
        group, start = self._places[name]
        size = self._weights[0][group].numel()
        rank = start // size
        before = 0
        for other, shape in self._groups[group].items():
            begin = self._places[other][1]
            if begin < start and begin + math.prod(shape) > rank * size:
                before += math.prod(shape)
        return rank, before


class SplitTensors:
    """Stage 3: each parameter is cut into equal pieces over the ranks that share it; a rank's pieces follow each other.

    Args:
        groups: shape of each parameter of each sub-group, in the order of the pieces.
        ranks: `optimizer_state_dict` of each rank that shares the parameters which are read.
        count_ranks: over how many ranks a parameter is cut.
    """

    def __init__(
        self, groups: Sequence[Shapes], ranks: Sequence[Mapping[str, Any]], count_ranks: Callable[[str], int]
    ) -> None:
        self.shapes: Shapes = {name: tuple(shape) for group in groups for name, shape in group.items()}
        self._places: dict[str, tuple[int, int]] = {}
        start = 0
        for name, shape in self.shapes.items():
            length = -(-math.prod(shape) // count_ranks(name))
            self._places[name] = (start, length)
            start += length
        self._weights = [rank["fp32_flat_groups"] for rank in ranks]
        self._states = [rank["optimizer_state_dict"]["state"] for rank in ranks]
        self.optimizer_step = _first_step(self._states[0])
        self.loss_scaler = _scaler_of(ranks[0])

    def state_keys(self, name: str) -> tuple[str, ...]:
        """As `EngineTensors`; under stage 3 all parameters have the same."""
        return _state_keys(self._states[0].get(0, {}))

    def read(self, name: str, key: str) -> torch.Tensor:
        """As `EngineTensors`."""
        start, length = self._places[name]
        shape = self.shapes[name]
        if key == WEIGHT:
            flat = self._weights
        else:
            flat = [[state[group][key] for group in sorted(state)] for state in self._states]
        whole = torch.cat([cut(pieces, start, length) for pieces in flat])
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


def _shape_of(state: Mapping[str, Any], weight: torch.Tensor) -> tuple[int, ...]:
    for key in _state_keys(state):
        return tuple(state[key].shape)
    return tuple(weight.shape)


def _state_keys(state: Mapping[str, Any]) -> tuple[str, ...]:
    """The entries of one optimizer state that are as large as its parameter (a step count is not)."""
    return tuple(key for key, value in state.items() if isinstance(value, torch.Tensor) and value.dim() > 0)


def _first_step(states: Mapping[int, Mapping[str, Any]]) -> float:
    """Updates that an optimizer has counted; one of its kinds may not count at all."""
    return max((float(state["step"]) for state in states.values() if "step" in state), default=0.0)


def _scaler_of(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """fp16's dynamic loss scale as plain numbers."""
    scaler = state.get("loss_scaler")
    if scaler is None or not state.get("dynamic_loss_scale"):
        return None
    return {name: value for name, value in vars(scaler).items() if isinstance(value, (bool, int, float))}
