"""Tensors by MiniMind's names, whole or in part, from DeepSpeed's files: ZeRO 0 to 3, any ranks, either expert backend.

A rank's file is opened when it is first needed and mapped, not read: a tensor costs memory while it is used. Works
without DeepSpeed.
"""

import fnmatch
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from minimind.checkpoints.manifest import CLIENT_STATE_KEY, CheckpointError, CheckpointManifest, read_manifest
from minimind.checkpoints.safe_load import read_states
from minimind.checkpoints.tensor_parts import WholeTensor
from minimind.checkpoints.zero_partitions import (
    WEIGHT,
    EngineTensors,
    FlatTensors,
    SplitTensors,
    States,
    WholeTensors,
)
from minimind.model.config import ModelConfig
from minimind.parallel.expert_names import EnginePart, find_part

_EXPERT_NUMBER = re.compile(r"(\.deepspeed_experts\.)\d+\.")
_RANK = re.compile(r"(?:zero_pp_rank|expp_rank)_(\d+)_(?:mp_rank_(\d+))?")

ENGINE_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
"""What DeepSpeed's own load sets on the engine beside tensors."""


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
        self._tensors: dict[str, WholeTensor] = {}
        self._places: list[tuple[EnginePart, str, int]] = []
        try:
            by_tensor_rank, by_expert_place = self._open()
            for name in by_tensor_rank[0].shapes:
                for place, tensors in enumerate(by_expert_place if self._is_expert(name) else by_tensor_rank):
                    part = self._find_part(name, place)
                    if place == 0 or part.index:  # the others have the same
                        self._tensors.setdefault(part.name, WholeTensor()).parts.append((part, tensors, name))
                        self._places.append((part, name, place))
            self.shapes: Mapping[str, Sequence[int]] = {name: item.shape for name, item in self._tensors.items()}
            """Shape of every parameter that the optimizer trains, by name."""
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder}: not laid out as expected: {error!r}") from None
        self.optimizer = by_tensor_rank[0]
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
        found = set()
        for part, name, place in self._places:
            used = self._read_module(place, name)
            if not torch.equal(self.read(part.name)[part.index].to(used.dtype), used):
                found.add(part.name)
        return sorted(found)

    def _open(self) -> tuple[list[EngineTensors], list[EngineTensors]]:
        """The tensors as the engines have them, by the places in a tensor group and, for experts, by the places in a
        group of `ep_size` neighbours: the same files in another order."""
        if self.manifest.zero_stage == 0:
            return self._open_whole()
        if (self.folder / "offloaded_tensors").exists():
            raise CheckpointError(
                f"{self.folder}: its optimizer state is in NVMe swap files, which cannot be read outside DeepSpeed"
            )
        # Opened when they are needed: of thousands, a rank that loads reads a few.
        states: list[States] = [
            functools.cache(functools.partial(_read_optimizer, path)) for path in self._files("*_optim_states.pt")
        ]
        world_size, ep_size, tp_size = self.manifest.world_size, self.manifest.ep_size, self.manifest.tp_size
        if len(states) != world_size:
            raise CheckpointError(f"{self.folder}: {len(states)} optimizer files of {world_size} ranks")
        groups = self.model_states["param_shapes"]
        places = [states[place::tp_size] for place in range(tp_size)], [states[i::ep_size] for i in range(ep_size)]

        def count_ranks(name: str) -> int:
            return world_size // (ep_size if self._is_expert(name) else tp_size)

        def open_each(ranks: list[list[States]]) -> list[EngineTensors]:
            if self.manifest.zero_stage < 3:
                return [FlatTensors(groups, own) for own in ranks]
            return [SplitTensors(groups, own, count_ranks) for own in ranks]

        return open_each(places[0]), open_each(places[1])

    def _open_whole(self) -> tuple[list[EngineTensors], list[EngineTensors]]:
        groups = self.model_states[CLIENT_STATE_KEY]["parameter_names"]
        names = [name for group in groups for name in group]
        ep_size, tensor_ranks = self.manifest.ep_size, self._states_by_tensor_rank
        if "num_experts" in self.model_states:  # beside experts the optimizer has files of its own
            paths = [self._files(f"expp_rank_*_{name}_optim_states.pt")[0] for name in self._tensor_ranks]
            experts = [self._files(f"expp_rank_{place}_*_optim_states.pt")[0] for place in range(ep_size)]
            optimizers = [[read_states(path)["optimizer"] for path in found] for found in (paths, experts)]
        else:
            optimizers = [[states["optimizer"] for states in tensor_ranks], []]

        def open_each(found: list[Mapping[str, Any]]) -> list[EngineTensors]:
            return [
                WholeTensors(names, optimizer, functools.partial(self._read_module, place))
                for place, optimizer in enumerate(found)
            ]

        return open_each(optimizers[0]), open_each(optimizers[1])

    @property
    def _tensor_ranks(self) -> list[str]:
        """What the ranks of a tensor group are called in the names of files."""
        return [f"mp_rank_{rank:02d}" for rank in range(self.manifest.tp_size)]

    @functools.cached_property
    def _states_by_tensor_rank(self) -> list[Mapping[str, Any]]:
        """The model states of stages 0 to 2."""
        others = [read_states(self.folder / f"{name}_model_states.pt") for name in self._tensor_ranks[1:]]
        return [self.model_states, *others]

    def _read_module(self, place: int, name: str) -> torch.Tensor:
        """What the forward of an engine used; not under stage 3."""
        if self._is_expert(name):
            index = self._find_part(name, place).index
            return _read_saved(self._saved_experts, name, index[0])
        return self._states_by_tensor_rank[place % self.manifest.tp_size]["module"][name]

    @functools.cached_property
    def _saved_experts(self) -> dict[str, torch.Tensor]:
        saved: dict[str, torch.Tensor] = {}
        for path in self._files("layer_*_expert_*_model_states.pt"):
            saved |= read_states(path)
        return saved

    def _find_part(self, name: str, place: int = 0) -> EnginePart:
        """What the ranks of a place have, in their groups of `ep_size` or `tp_size`."""
        ep_size, tp_size = self.manifest.ep_size, self.manifest.tp_size
        return find_part(name, self._config, ep_size, place % ep_size, tp_size=tp_size, tp_rank=place % tp_size)

    def _is_expert(self, name: str) -> bool:
        return bool(find_part(name, self._config, self.manifest.ep_size).index)

    def _files(self, pattern: str) -> list[Path]:
        """The files that match, by the number of their rank."""
        found = [self.folder / record.path for record in self.manifest.files if fnmatch.fnmatch(record.path, pattern)]
        if not found:
            raise CheckpointError(f"{self.folder}: no {pattern} in it")
        return sorted(found, key=_rank_of)


def _read_optimizer(path: Path) -> Mapping[str, Any]:
    return read_states(path)["optimizer_state_dict"]


def _read_saved(saved: Mapping[str, torch.Tensor], name: str, experts: int | slice) -> torch.Tensor:
    """An engine's parameter of experts, as the engine has it, out of DeepSpeed's files of single experts."""
    if isinstance(experts, int):
        return saved[_EXPERT_NUMBER.sub(rf"\g<1>{experts}.", name)]
    return torch.stack([saved[f"{name}.{expert}"] for expert in range(experts.start, experts.stop)])


def _rank_of(path: Path) -> tuple[int, int]:
    """Its numbers in the names of files: the last, of a tensor group, counts neighbours."""
    match = _RANK.search(path.name)
    return (int(match[1]), int(match[2] or 0)) if match else (0, 0)
