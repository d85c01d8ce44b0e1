"""Tensors by MiniMind's names, whole or in part, from DeepSpeed's files: ZeRO 0 to 3, any ranks, either expert backend.

A rank's file is opened when it is first needed and mapped, not read: a tensor costs memory while it is used. Works
without DeepSpeed.
"""

import fnmatch
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minimind.checkpoints.manifest import CLIENT_STATE_KEY, CheckpointError, CheckpointManifest, read_manifest
from minimind.checkpoints.safe_load import read_states
from minimind.checkpoints.zero_partitions import WEIGHT, EngineTensors, FlatTensors, SplitTensors, WholeTensors
from minimind.model.config import ModelConfig
from minimind.parallel.expert_names import EnginePart, find_part

Index = tuple[int | slice, ...]
_EXPERT_NUMBER = re.compile(r"(\.deepspeed_experts\.)\d+\.")
_RANK = re.compile(r"(?:zero_pp_rank|expp_rank)_(\d+)_")

ENGINE_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
"""What DeepSpeed's own load sets on the engine beside tensors."""


@dataclass
class _Tensor:
    """One tensor of the model: the parameters of engines that it is made of."""

    parts: list[tuple[EnginePart, EngineTensors, str]] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        return _whole_shape([(part.index, tensors.shapes[name]) for part, tensors, name in self.parts])

    @property
    def state_keys(self) -> tuple[str, ...]:
        _, tensors, name = self.parts[0]
        return tensors.state_keys(name)

    def read(self, key: str) -> torch.Tensor:
        part, tensors, name = self.parts[0]
        if not part.index:
            return tensors.read(name, key)
        whole = torch.empty(self.shape)
        for part, tensors, name in self.parts:
            whole[part.index] = tensors.read(name, key)
        return whole

    def read_range(self, index: Index, key: str, start: int, stop: int) -> torch.Tensor:
        """The elements from `start` to `stop` of `whole[index]`, laid flat."""
        _, tensors, name = self.parts[0]
        if not index:
            return tensors.read_range(name, key, start, stop)
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


class TrainingCheckpoint:
    """A checkpoint folder of a run, tensor by tensor. It must have been compared with its manifest before.

    Raises:
        CheckpointError: a file is not what DeepSpeed writes, or the folder is of a kind that is not read here.
    """

    def __init__(self, folder: Path, manifest: CheckpointManifest | None = None) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder) if manifest is None else manifest
        # Of single experts there are files of their own, layer_*; this is the first of those with everything else.
        found = self._files("*mp_rank_00_model_states.pt")
        self.model_states = read_states(next(path for path in found if not path.name.startswith("layer_")))
        self._config = ModelConfig.from_dict(self.manifest.model)
        self._tensors: dict[str, _Tensor] = {}
        try:
            ranks = self._open()
            for part, tensors, name in self._find_parts(ranks):
                self._tensors.setdefault(part.name, _Tensor()).parts.append((part, tensors, name))
            self._by_place = ranks[1:]
            self.shapes: Mapping[str, Sequence[int]] = {name: item.shape for name, item in self._tensors.items()}
            """Shape of every parameter that the optimizer trains, by name."""
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder}: not laid out as expected: {error!r}") from None
        self.optimizer = ranks[0]
        """Its counts, settings and loss scale."""

    @property
    def keys(self) -> tuple[str, ...]:
        """What there is of parameters: `fp32`, then the tensors of the optimizer's state; see `keys_of`."""
        return tuple(dict.fromkeys(key for name in self.shapes for key in self.keys_of(name)))

    def keys_of(self, name: str) -> tuple[str, ...]:
        """What there is of one parameter."""
        return (WEIGHT, *self._tensors[name].state_keys)

    def read(self, name: str, key: str = WEIGHT) -> torch.Tensor:
        """One parameter's weight, or a tensor of its optimizer state, whole: float32, of the parameter's shape."""
        return self._tensors[name].read(key)

    def read_range(self, part: EnginePart, key: str, start: int, stop: int) -> torch.Tensor:
        """The elements from `start` to `stop` of a part of what `read` gives, laid flat; no others are read."""
        return self._tensors[part.name].read_range(part.index, key, start, stop)

    def buffers(self) -> dict[str, torch.Tensor]:
        """What the model carries beside its parameters, by name."""
        module = self.model_states["module"]
        return {find_part(name, self._config).name: module[name] for name in self.model_states["buffer_names"]}

    def state_dict(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and float32 weights of the whole model, one at a time; a tied matrix comes once."""
        for name in self.shapes:
            yield name, self.read(name)
        yield from self.buffers().items()

    def find_contradictions(self) -> list[str]:
        """Parameters whose float32 weights are not, rounded, the ones that forward used, of which DeepSpeed saves a
        copy. Under stage 3 there is none, and nothing is found."""
        if self.manifest.zero_stage == 3:
            return []
        found = []
        for ep_rank, tensors in enumerate(self._by_place):
            for name in tensors.shapes:
                used = self._read_module(ep_rank, name)
                part = self._find_part(name, ep_rank)
                if not torch.equal(self.read(part.name)[part.index].to(used.dtype), used):
                    found.append(part.name)
        return sorted(set(found))

    def _open(self) -> list[EngineTensors]:
        """The tensors as the engines have them: a list by the places in a group of `ep_size` neighbours. What is not an
        expert is the same in all, but cut over more ranks."""
        if self.manifest.zero_stage == 0:
            return self._open_whole()
        if (self.folder / "offloaded_tensors").exists():
            raise CheckpointError(
                f"{self.folder}: its optimizer state is in NVMe swap files, which cannot be read outside DeepSpeed"
            )
        # Opened when they are needed: of thousands, a rank that loads reads a few.
        states = [
            functools.cache(functools.partial(_read_optimizer, path)) for path in self._files("*_optim_states.pt")
        ]
        world_size, ep_size = self.manifest.world_size, self.manifest.ep_size
        if len(states) != world_size:
            raise CheckpointError(f"{self.folder}: {len(states)} optimizer files of {world_size} ranks")
        groups = self.model_states["param_shapes"]
        of_places = [states, *(states[place::ep_size] for place in range(ep_size))]
        if self.manifest.zero_stage < 3:
            return [FlatTensors(groups, ranks) for ranks in of_places]

        def count_ranks(name: str) -> int:
            return world_size // ep_size if self._is_expert(name) else world_size

        return [SplitTensors(groups, ranks, count_ranks) for ranks in of_places]

    def _open_whole(self) -> list[EngineTensors]:
        groups = self.model_states[CLIENT_STATE_KEY]["parameter_names"]
        names = [name for group in groups for name in group]
        if "num_experts" in self.model_states:
            optimizers = [read_states(path)["optimizer"] for path in self._files("expp_rank_*_optim_states.pt")]
        else:
            optimizers = [self.model_states["optimizer"]]
        if len(optimizers) != self.manifest.ep_size:
            raise CheckpointError(f"{self.folder}: {len(optimizers)} optimizer files, ep size {self.manifest.ep_size}")
        ranks: list[EngineTensors] = [
            WholeTensors(names, optimizer, functools.partial(self._read_module, place))
            for place, optimizer in enumerate(optimizers)
        ]
        return [ranks[0], *ranks]

    def _read_module(self, ep_rank: int, name: str) -> torch.Tensor:
        """What the forward of an engine used; not under stage 3."""
        index = self._find_part(name, ep_rank).index
        return _read_saved(self._saved_experts, name, index[0]) if index else self.model_states["module"][name]

    @functools.cached_property
    def _saved_experts(self) -> dict[str, torch.Tensor]:
        saved: dict[str, torch.Tensor] = {}
        for path in self._files("layer_*_expert_*_model_states.pt"):
            saved |= read_states(path)
        return saved

    def _find_parts(self, ranks: Sequence[EngineTensors]) -> Iterator[tuple[EnginePart, EngineTensors, str]]:
        shared, *by_place = ranks
        for name in shared.shapes:
            if self._is_expert(name):
                for ep_rank, tensors in enumerate(by_place):
                    yield self._find_part(name, ep_rank), tensors, name
            else:
                yield self._find_part(name), shared, name

    def _find_part(self, name: str, ep_rank: int = 0) -> EnginePart:
        return find_part(name, self._config, self.manifest.ep_size, ep_rank)

    def _is_expert(self, name: str) -> bool:
        return bool(self._find_part(name).index)

    def _files(self, pattern: str) -> list[Path]:
        """The files that match, by the number of their rank."""
        found = [self.folder / record.path for record in self.manifest.files if fnmatch.fnmatch(record.path, pattern)]
        if not found:
            raise CheckpointError(f"{self.folder}: no {pattern} in it")
        return sorted(found, key=_rank_of)


def _read_optimizer(path: Path) -> Mapping[str, Any]:
    return read_states(path)["optimizer_state_dict"]


def _experts(index: Index) -> tuple[int, int]:
    """The first expert of a part, and the one behind its last."""
    experts = index[0]
    return (experts, experts + 1) if isinstance(experts, int) else (experts.start, experts.stop)


def _read_saved(saved: Mapping[str, torch.Tensor], name: str, experts: int | slice) -> torch.Tensor:
    """An engine's parameter of experts, as the engine has it, out of DeepSpeed's files of single experts."""
    if isinstance(experts, int):
        return saved[_EXPERT_NUMBER.sub(rf"\g<1>{experts}.", name)]
    return torch.stack([saved[f"{name}.{expert}"] for expert in range(experts.start, experts.stop)])


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


def _rank_of(path: Path) -> int:
    match = _RANK.search(path.name)
    return int(match[1]) if match else 0
