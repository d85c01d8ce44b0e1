"""Who makes the host wait, and how often; operators and collectives beside it."""

import collections
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from simulated_device import collectives
from simulated_device.device_module import device

HIDDEN = ("/torch/", "/simulated_device/", "functools.py", "contextlib.py")
FRAMES = 3


@dataclass
class Trace:
    """What was counted."""

    waits: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    """By (kind, place): the frames above a wait, the innermost first."""
    operators: dict[str, int] = field(default_factory=dict)
    collectives: dict[str, int] = field(default_factory=dict)

    def of(self, package: str) -> dict[str, int]:
        """The waits whose innermost frame lies in `package`, by place and kind."""
        return {f"{place}: {kind}": n for (kind, place), n in self.waits.items() if place.startswith(f"{package}/")}


def _place(frame: FrameType | None) -> str:
    found: list[str] = []
    while frame is not None and len(found) < FRAMES:
        file = frame.f_code.co_filename
        if not any(part in file for part in HIDDEN):
            parts = Path(file).parts
            start = next((parts.index(name) for name in ("deepspeed", "minimind") if name in parts), -1)
            found.append(f"{'/'.join(parts[start:])}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(found)


@contextlib.contextmanager
def trace() -> Iterator[Trace]:
    """Count in the block."""
    counted = Trace()
    before = collections.Counter(collectives.seen)
    device.reset_counts()
    device.on_wait(lambda kind: counted.waits.update([(kind, _place(sys._getframe(1)))]))
    try:
        yield counted
    finally:
        device.on_wait(None)
        counted.operators = device.operators()
        counted.collectives = dict(collectives.seen - before)
