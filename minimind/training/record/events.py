"""events.jsonl: starts, resumes, saves, stops, failures and alarms of a run, one object a line.

Only ever appended to, so steps that are repeated after a resume leave their events twice.
"""

import contextlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from minimind.training.record.run_files import append_object, read_objects

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


def write_event(run_dir: Path, event: str, step: int, message: str, kind: str = "") -> None:
    """Append one event. Rank 0 only.

    Raises:
        UserError: the disk refuses.
    """
    append_object(run_dir / EVENTS_NAME, asdict(Event(step, event, message, kind, round(time.time(), 3))))


def read_events(run_dir: Path) -> list[Event]:
    """The events of a run, oldest first. Unreadable lines are skipped; no file is no events."""
    events = []
    for values in read_objects(run_dir / EVENTS_NAME):
        with contextlib.suppress(TypeError, AttributeError):
            if isinstance(values.get("step"), int):
                events.append(Event(**values))
    return events
