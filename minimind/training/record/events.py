"""events.jsonl: starts, resumes, saves, stops, failures and alarms of a run, one object a line.

Only ever appended to, so steps that are repeated after a resume leave their events twice.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

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
    """Of an alarm."""
    time: float = 0.0
    """Seconds since 1970."""


class EventLog:
    """Appends to a run's events.jsonl. Rank 0 only."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / EVENTS_NAME

    def write(self, event: str, step: int, message: str, kind: str = "") -> None:
        """Append one event, on a line of its own even after a line that a crash cut short.

        Raises:
            UserError: the disk refuses.
        """
        line = json.dumps(asdict(Event(step, event, message, kind, round(time.time(), 3)))) + "\n"
        try:
            with open(self._path, "a+b") as file:
                if file.tell():
                    file.seek(-1, 2)
                    line = line if file.read(1) == b"\n" else "\n" + line
                file.write(line.encode())
        except OSError as error:
            raise UserError(f"{self._path}: {error.strerror or error}; free disk space and resume the run") from None


def read_events(run_dir: Path) -> list[Event]:
    """The events of a run, oldest first. Unreadable lines are skipped; no file is no events."""
    path = run_dir / EVENTS_NAME
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            events.append(Event(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return events
