"""One tensor of the model, of the parts that the engines' ranks hold: whole, in part, whatever the cut.

Experts are cut by expert, and their gate from their up; matrices that tensor groups share by rows or by columns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from minimind.checkpoints.zero_partitions import EngineTensors
from minimind.config.tensor_parallel import cut_dimension
from minimind.parallel.expert_names import EnginePart

Index = tuple[int | slice, ...]


@dataclass
class WholeTensor:
    """One tensor of the model: the parameters of engines that it is made of."""

    parts: list[tuple[EnginePart, EngineTensors, str]] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        return _whole_shape([(part.index, tensors.shapes[name]) for part, tensors, name in self.parts])

    @property
    def state_keys(self) -> tuple[str, ...]:
        """What the optimizer keeps of it."""
        _, tensors, name = self.parts[0]
        return tensors.state_keys(name)

    def read(self, key: str) -> torch.Tensor:
        """The whole tensor."""
        part, tensors, name = self.parts[0]
        if not part.index:
            return tensors.read(name, key)
        whole = torch.empty(self.shape)
        for part, tensors, name in self.parts:
            whole[part.index] = tensors.read(name, key)
        return whole

    def read_range(self, index: Index, key: str, start: int, stop: int) -> torch.Tensor:
        """The elements from `start` to `stop` of `whole[index]`, laid flat."""
        part, tensors, name = self.parts[0]
        if index == part.index and len(self.parts) == 1:
            return tensors.read_range(name, key, start, stop)
        if cut_dimension(part.name) is not None:
            return self._read_matrix(index, key, start, stop)
        first, found = _experts(index)[0], []
        for part, tensors, name in sorted(self.parts, key=lambda item: _experts(item[0].index)):
            if part.index[1:] == index[1:]:  # the same of an expert's matrices
                begin, end = _experts(part.index)
                size = math.prod(tensors.shapes[name]) // (end - begin)
                low, high = max(start, (begin - first) * size), min(stop, (end - first) * size)
                if low < high:
                    place = (begin - first) * size
                    found.append(tensors.read_range(name, key, low - place, high - place))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _read_matrix(self, index: Index, key: str, start: int, stop: int) -> torch.Tensor:
        """`read_range` of what tensor groups share, here or where it goes: whole rows are read, and cut."""
        shape = (*self.shape, 1)  # a bias is a matrix of one column
        (first, _), columns = (_bounds(index, dimension, shape) for dimension in (0, 1))
        width = columns[1] - columns[0]
        low, high = start // width, -(-stop // width)
        block = self._read_rows(key, first + low, first + high, shape[1])[:, slice(*columns)]
        return block.reshape(-1)[start - low * width : stop - low * width]

    def _read_rows(self, key: str, low: int, high: int, width: int) -> torch.Tensor:
        """The rows from `low` to `high`, (high - low, width)."""
        found, dimension = [], cut_dimension(self.parts[0][0].name) or 0
        for part, tensors, name in sorted(self.parts, key=lambda item: _bounds(item[0].index, dimension, self.shape)):
            first, last = _bounds(part.index, 0, self.shape)
            begin, end = max(low, first), min(high, last)
            own = width if dimension == 0 else tensors.shapes[name][1]
            if begin < end:
                rows = tensors.read_range(name, key, (begin - first) * own, (end - first) * own)
                found.append(rows.view(end - begin, own))
        return found[0] if len(found) == 1 else torch.cat(found, dimension)


def _bounds(index: Index, dimension: int, shape: Sequence[int]) -> tuple[int, int]:
    """From where to where a part goes along a dimension."""
    item = index[dimension] if dimension < len(index) else slice(0, shape[dimension])
    assert isinstance(item, slice)
    return item.start, item.stop


def _experts(index: Index) -> tuple[int, int]:
    """The first expert of a part, and the one behind its last."""
    experts = index[0]
    return (experts, experts + 1) if isinstance(experts, int) else (experts.start, experts.stop)


def _whole_shape(parts: Sequence[tuple[Index, Sequence[int]]]) -> tuple[int, ...]:
    """Shape of what these parts, each at its place and with its own shape, make up."""
    ends: list[int] = []
    for place, shape in parts:
        reached = list(shape)
        for position, item in enumerate(place):
            if isinstance(item, int):
                reached.insert(position, item + 1)
            else:
                reached[position] = item.stop
        ends = [max(pair) for pair in zip(ends, reached, strict=True)] if ends else reached
    return tuple(ends)
