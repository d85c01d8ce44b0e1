"""What happened to a run beside its steps: events.jsonl in its folder, one object a line, written as it happens.

Starts, resumes, saves, stops and alarms, with the step and the time of each. Appended to and never rewritten, so what a
resume repeats stands twice. Knows nothing of what the events mean.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minimind.errors import UserError

EVENTS_NAME = "events.jsonl"


@dataclass(frozen=True)
class Event:
    """One thing that happened after `step` optimizer steps."""

    step: int
    event: str
    """start, resume, save, stop, finish, fail or alarm."""
    message: str
    kind: str = ""
    """Of an alarm: which one."""
    time: float = 0.0
    """Seconds since 1970."""


class EventLog:
    """Appends to a run's events.jsonl; rank 0 alone has one."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / EVENTS_NAME

    def write(self, event: str, step: int, message: str, kind: str = "") -> None:
        """Add one event. A line that a crash has cut in two is ended first, so that this one can be read.

        Raises:
            UserError: the disk refuses.
        """
        line = json.dumps(asdict(Event(step, event, message, kind, round(time.time(), 3)))) + "\n"
        try:
            with open(self._path, "a+b") as file:
                if file.tell() and not _ends_a_line(file):
                    line = "\n" + line
                file.write(line.encode())
        except OSError as error:
            raise UserError(f"{self._path}: {error.strerror or error}; free disk space and resume the run") from None


def _ends_a_line(file: Any) -> bool:
    file.seek(-1, 2)
    return file.read(1) == b"\n"


def read_events(run_dir: Path) -> list[Event]:
    """The events of a run, oldest first; lines that cannot be read are passed over, a missing file is no events."""
    path = run_dir / EVENTS_NAME
    if not path.exists():
        return []
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            events.append(Event(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return events
