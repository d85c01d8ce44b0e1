"""Whole tensors, by MiniMind's names, out of the files that DeepSpeed wrote: ZeRO 0 to 3, on any number of ranks.

Files are mapped, not read: a tensor costs memory while it is looked at. They are read with `weights_only`, so nothing
in them runs, and without DeepSpeed, whose few small state classes are stood in for. Knows nothing of engines.
"""

import itertools
import math
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from minimind.checkpoint_files import CLIENT_STATE_KEY, CheckpointError, CheckpointManifest, read_manifest

WEIGHT = "fp32"
"""The key of the float32 weights, beside those of the optimizer's state (`exp_avg`, `exp_avg_sq`)."""

# Classes of DeepSpeed in its files: a loss scale, an enumeration, two numbers.
_DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)

_RANK = re.compile(r"zero_pp_rank_(\d+)_")


class StateValue:
    """What a class of DeepSpeed held: `args` it was made with, and its attributes."""

    def __init__(self, *args: Any) -> None:
        self.args = args


def read_states(path: Path) -> dict[str, Any]:
    """The content of one of DeepSpeed's files, its tensors mapped from the disk, without importing DeepSpeed.

    Raises:
        CheckpointError: as `load_states`.
    """
    return load_states(path, [(StateValue, name) for name in _DEEPSPEED_CLASSES], mmap=True)


def load_states(path: Path, classes: Sequence[Any], *, mmap: bool) -> dict[str, Any]:
    """The content of one of DeepSpeed's files in host memory. No code in the file is run.

    Args:
        classes: what it may hold beside tensors and plain values: classes, or (stand-in, name of a class).

    Raises:
        CheckpointError: it cannot be read, or refers to anything else.
    """
    try:
        with torch.serialization.safe_globals(list(classes)):
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it refers to {reason[1]}" if reason else str(error).splitlines()[0]
        raise CheckpointError(f"{path}: not loaded, because only tensors and plain values are safe: {what}") from None
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None


class TrainingCheckpoint:
    """A checkpoint folder of a run, tensor by tensor. It must have been compared with its manifest before.

    Raises:
        CheckpointError: a file is not what DeepSpeed writes, or the folder is of a kind that is not read here.
    """

    def __init__(self, folder: Path, manifest: CheckpointManifest | None = None) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder) if manifest is None else manifest
        by_rank = sorted(self._files("*_model_states.pt"), key=_rank_of)
        self.model_states = read_states(by_rank[0])
        try:
            self._tensors = self._open()
        except (KeyError, IndexError, TypeError) as error:
            raise CheckpointError(f"{folder}: not laid out as expected: {error!r}") from None

    @property
    def shapes(self) -> Mapping[str, Sequence[int]]:
        """Shape of every parameter that the optimizer trains, by name."""
        return self._tensors.shapes

    @property
    def keys(self) -> tuple[str, ...]:
        """What there is of each parameter: `fp32`, then the tensors of the optimizer's state."""
        return (WEIGHT, *self._tensors.state_keys)

    @property
    def optimizer_step(self) -> float:
        """Updates that the optimizer has made, as it counts them."""
        return self._tensors.optimizer_step

    @property
    def loss_scaler(self) -> dict[str, Any] | None:
        """Attributes of fp16's dynamic loss scale, or None where there is none."""
        return self._tensors.loss_scaler

    def read(self, name: str, key: str = WEIGHT) -> torch.Tensor:
        """One parameter's weight, or a tensor of its optimizer state, whole: float32, of the parameter's shape."""
        return self._tensors.read(name, key)

    def buffers(self) -> dict[str, torch.Tensor]:
        """What the model carries beside its parameters, by name."""
        module = self.model_states["module"]
        return {name: module[name] for name in self.model_states["buffer_names"]}

    def state_dict(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and float32 weights of the whole model, one at a time; a tied matrix comes once."""
        for name in self.shapes:
            yield name, self.read(name)
        yield from self.buffers().items()

    def _open(self) -> "_WholeTensors | _FlatTensors | _SplitTensors":
        if "num_experts" in self.model_states:
            raise CheckpointError(f"{self.folder}: checkpoints of expert models are not read here")
        stage = self.manifest.zero_stage
        if stage == 0:
            return _WholeTensors(self.model_states)
        if (self.folder / "offloaded_tensors").exists():
            raise CheckpointError(
                f"{self.folder}: its optimizer state lies in NVMe swap files, which are not read here"
            )
        files = sorted(self._files("*_optim_states.pt"), key=_rank_of)
        ranks = [read_states(path)["optimizer_state_dict"] for path in files]
        if len(ranks) != self.manifest.world_size:
            raise CheckpointError(f"{self.folder}: {len(ranks)} optimizer files of {self.manifest.world_size} ranks")
        layout = _SplitTensors if stage == 3 else _FlatTensors
        return layout(self.model_states["param_shapes"], ranks)

    def _files(self, pattern: str) -> list[Path]:
        found = list(self.folder.glob(pattern))
        if not found:
            raise CheckpointError(f"{self.folder}: no {pattern} in it")
        return found


def _rank_of(path: Path) -> int:
    match = _RANK.search(path.name)
    return int(match[1]) if match else 0


class _WholeTensors:
    """Stage 0: every rank has everything, and the optimizer numbers the parameters group by group."""

    def __init__(self, states: Mapping[str, Any]) -> None:
        self._module, optimizer = states["module"], states["optimizer"]
        groups = states[CLIENT_STATE_KEY]["parameter_names"]
        names = list(itertools.chain.from_iterable(groups))
        numbers = itertools.chain.from_iterable(group["params"] for group in optimizer["param_groups"])
        state = optimizer["state"]
        self._state = {name: state.get(number, {}) for name, number in zip(names, numbers, strict=True)}
        self.shapes = {name: tuple(self._module[name].shape) for name in names}
        self.state_keys = _state_keys(self._state[names[0]])
        self.optimizer_step = float(self._state[names[0]].get("step", 0))
        self.loss_scaler = None

    def read(self, name: str, key: str) -> torch.Tensor:
        return (self._module[name] if key == WEIGHT else self._state[name][key]).float()


class _FlatTensors:
    """Stages 1 and 2: each group of parameters is one flat vector, cut into equal pieces over the ranks."""

    def __init__(self, param_shapes: Sequence[Mapping[str, Sequence[int]]], ranks: Sequence[Mapping[str, Any]]) -> None:
        self.shapes = {name: tuple(shape) for group in param_shapes for name, shape in group.items()}
        self._places: dict[str, tuple[int, int]] = {}
        paddings = ranks[0].get("param_alignment_paddings")
        for number, group in enumerate(param_shapes):
            start = 0
            for place, (name, shape) in enumerate(group.items()):
                self._places[name] = (number, start)
                # Padding between parameters is part of the vector; the padding at its end no parameter reaches.
                start += math.prod(shape) + (paddings[number][place] if paddings else 0)
        self._weights = [rank["single_partition_of_fp32_groups"] for rank in ranks]
        self._states = [rank["base_optimizer_state"]["state"] for rank in ranks]
        self.state_keys = _state_keys(self._states[0].get(0, {}))
        self.optimizer_step = float(self._states[0].get(0, {}).get("step", 0))
        self.loss_scaler = _scaler_of(ranks[0])

    def read(self, name: str, key: str) -> torch.Tensor:
        group, start = self._places[name]
        shape = self.shapes[name]
        if key == WEIGHT:
            pieces = [weights[group] for weights in self._weights]
        else:
            pieces = [states[group][key] for states in self._states]
        return _cut(pieces, start, math.prod(shape)).view(shape).float()


class _SplitTensors:
    """Stage 3: each parameter is cut into equal pieces over the ranks; a rank's pieces follow each other."""

    def __init__(self, param_shapes: Sequence[Mapping[str, Sequence[int]]], ranks: Sequence[Mapping[str, Any]]) -> None:
        self.shapes = {name: tuple(shape) for group in param_shapes for name, shape in group.items()}
        self._places: dict[str, tuple[int, int]] = {}
        start = 0
        for name, shape in self.shapes.items():
            length = -(-math.prod(shape) // len(ranks))
            self._places[name] = (start, length)
            start += length
        self._weights = [rank["fp32_flat_groups"] for rank in ranks]
        self._states = [rank["optimizer_state_dict"]["state"] for rank in ranks]
        self.state_keys = _state_keys(self._states[0].get(0, {}))
        self.optimizer_step = float(self._states[0].get(0, {}).get("step", 0))
        self.loss_scaler = _scaler_of(ranks[0])

    def read(self, name: str, key: str) -> torch.Tensor:
        start, length = self._places[name]
        shape = self.shapes[name]
        if key == WEIGHT:
            flat = self._weights
        else:
            flat = [[state[group][key] for group in sorted(state)] for state in self._states]
        whole = torch.cat([_cut(pieces, start, length) for pieces in flat])
        return whole[: math.prod(shape)].view(shape).float()


def _state_keys(state: Mapping[str, Any]) -> tuple[str, ...]:
    """The entries of one optimizer state that are as large as its parameter (a step count is not)."""
    return tuple(key for key, value in state.items() if isinstance(value, torch.Tensor) and value.dim() > 0)


def _scaler_of(state: Mapping[str, Any]) -> dict[str, Any] | None:
    scaler = state.get("loss_scaler")
    return dict(vars(scaler)) if scaler is not None and state.get("dynamic_loss_scale") else None


def _cut(pieces: Sequence[torch.Tensor], start: int, length: int) -> torch.Tensor:
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
