"""Read DeepSpeed's files without running code in them.

They are pickles, so they could hold any program. Here they are read with `weights_only`: tensors, plain values and a
few small state classes of DeepSpeed, with stand-ins where DeepSpeed is not installed.
"""

import pickle
import re
import threading
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from minimind.checkpoints.manifest import CheckpointError
from minimind.errors import first_line

# Classes of DeepSpeed in its files: a loss scale, an enumeration, two numbers.
_DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)

_ALLOWED = threading.Lock()
"""What torch allows in a file is one list for all threads of a process."""


class StateValue:
    """What a class of DeepSpeed held: `args` it was made with, and its attributes."""

    def __init__(self, *args: Any) -> None:
        self.args = args


def _enum_member(kind: type, name: str) -> Any:
    """What a file gets for `getattr`, by which Python 3.11.0 to 3.11.3 (Debian 12's) pickles members of an `Enum`."""
    if not (isinstance(kind, type) and issubclass(kind, (Enum, StateValue))):
        raise pickle.UnpicklingError("GLOBAL getattr")
    return kind[name] if issubclass(kind, Enum) else kind(name)


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
        with _ALLOWED, torch.serialization.safe_globals([*classes, (_enum_member, "builtins.getattr")]):
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it refers to {reason[1]}" if reason else first_line(error)
        raise CheckpointError(f"{path}: not loaded, because only tensors and plain values are safe: {what}") from None
    except (OSError, RuntimeError, LookupError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path}: cannot be read: {first_line(error)}") from None
