"""The status of runs, read from their folders."""

import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minimind.checkpoints.folder import list_checkpoints, step_of
from minimind.errors import UserError
from minimind.training.record.events import Event, read_events
from minimind.training.record.run_files import (
    METRICS_NAME,
    RUN_CONFIG_NAME,
    EvaluationRecord,
    StepRecord,
    evaluations_of,
    read_records,
    steps_of,
)
from minimind.training.run_lock import LOCK_NAME, PATIENCE_SECONDS
from minimind.units import format_duration, format_table

TAIL_BYTES = 2**19
TREND_STEPS = 50
# Without a lock file, a run that has just written a step is taken to be running.
FRESH_SECONDS = 60.0


@dataclass(frozen=True)
class RunStatus:
    """The status of a run, from its folder."""

    name: str
    state: str
    """running, finished, stopped, failed, crashed, starting, or never started."""
    step: int
    total_steps: int | None
    loss: float | None
    trend: str
    eval_loss: float | None
    sources: str
    """Loss of each source of a mixture: of its evaluation, before there is one, of the last step that read it."""
    tokens_per_second: float | None
    mfu: float | None
    seconds_left: float | None
    checkpoint: int | None
    """Step of the newest."""
    health: str


def find_runs(path: Path) -> list[Path]:
    """The run folder itself, or the runs inside a folder of runs.

    Raises:
        UserError: no such folder.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a run's folder, the --run-dir of its training")
    if is_run(path):
        return [path]
    inside = sorted(folder for folder in path.iterdir() if folder.is_dir() and is_run(folder))
    return inside or [path]


def is_run(folder: Path) -> bool:
    """Whether a training has ever been started there."""
    return (folder / RUN_CONFIG_NAME).exists() or (folder / METRICS_NAME).exists()


def read_status(folder: Path) -> RunStatus:
    """Read a run's status from its folder."""
    records, events = read_records(folder / METRICS_NAME, TAIL_BYTES), read_events(folder)
    steps, evaluations = steps_of(records), evaluations_of(records)
    last: StepRecord = steps[-1] if steps else {"step": 0}
    total = _total_steps(folder)
    checkpoints = list_checkpoints(folder)
    state = find_state(folder, steps, events)
    step = last["step"]
    seconds = [value for record in steps[-TREND_STEPS:] if (value := record.get("step_seconds")) is not None]
    left = None
    if state == "running" and total and seconds:
        left = max(0, total - step) * statistics.median(seconds)
    return RunStatus(
        name=folder.name or str(folder),
        state=state,
        step=step,
        total_steps=total,
        loss=last.get("loss"),
        trend=describe_trend(steps),
        eval_loss=evaluations[-1].get("eval_loss") if evaluations else None,
        sources=describe_sources(steps, evaluations),
        tokens_per_second=last.get("tokens_per_second"),
        mfu=last.get("mfu"),
        seconds_left=left,
        checkpoint=step_of(checkpoints[-1]) if checkpoints else None,
        health=describe_health(state, events, step),
    )


def find_state(folder: Path, steps: Sequence[StepRecord], events: Sequence[Event]) -> str:
    """The state of a run, from its lock's age and its last event."""
    if not is_run(folder):
        return "never started"
    last = next((event for event in reversed(events) if event.event not in ("alarm", "save")), None)
    lock = _age(folder / LOCK_NAME)
    if lock is not None and lock < PATIENCE_SECONDS:
        return "running" if steps else "starting"
    ended = {"finish": "finished", "stop": "stopped", "fail": "failed"}
    if last is not None and last.event in ended:
        return ended[last.event]
    age = _age(folder / METRICS_NAME)
    if lock is None and last is None and (age is None or age > FRESH_SECONDS):
        return "never started" if not steps else "ended"
    return "running" if lock is None and age is not None and age < FRESH_SECONDS else "crashed"


def describe_trend(steps: Sequence[StepRecord]) -> str:
    """falling, rising or flat: mean loss of the newest steps against the steps before, by its standard error."""
    losses = [value for record in steps[-2 * TREND_STEPS :] if (value := record.get("loss")) is not None]
    if len(losses) < 8:
        return ""
    half = len(losses) // 2
    before, now = losses[:half], losses[half:]
    change = statistics.fmean(now) - statistics.fmean(before)
    error = math.hypot(statistics.stdev(before) / half**0.5, statistics.stdev(now) / len(now) ** 0.5)
    if abs(change) <= 2 * error:
        return "flat"
    return "falling" if change < 0 else "rising"


def describe_sources(steps: Sequence[StepRecord], evaluations: Sequence[EvaluationRecord]) -> str:
    """The newest loss of each source of a mixture; of a single corpus nothing."""
    losses = evaluations[-1].get("eval_source_loss") if evaluations else None
    if losses is None:
        losses = {name: loss for record in steps for name, loss in record.get("source_loss", {}).items()}
    return ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items() if isinstance(loss, float))


def describe_health(state: str, events: Sequence[Event], step: int) -> str:
    """ "ok", or the newest alarms and failures since the last start."""
    begun = max((i for i, event in enumerate(events) if event.event in ("start", "resume")), default=0)
    since = events[begun:]
    if state == "failed":
        return next(event.message for event in reversed(since) if event.event == "fail")
    if state == "crashed":
        return "ended without an event (killed?); the same command continues it"
    alarms = {event.kind: event for event in since if event.event == "alarm"}
    if not alarms:
        return "ok"
    return "; ".join(f"{kind} at step {event.step}" for kind, event in alarms.items())


def status_table(found: Sequence[RunStatus]) -> str:
    """A heading and a line for each run, in columns."""

    def cell(value: float | None, pattern: str) -> str:
        return "" if value is None else pattern.format(value)

    by_source = any(status.sources for status in found)
    rows = [
        ("run", "state", "step", "loss", "eval", *["by source"] * by_source, "tokens/s", "MFU", "ETA", "checkpoint",
         "health")
    ]  # fmt: skip
    for status in found:
        total = f"/{status.total_steps}" if status.total_steps else ""
        rows.append(
            (
                status.name,
                status.state,
                f"{status.step}{total}" if status.step or total else "",
                f"{cell(status.loss, '{:.4f}')} {status.trend}".strip(),
                cell(status.eval_loss, "{:.4f}"),
                *[status.sources] * by_source,
                cell(status.tokens_per_second, "{:,.0f}"),
                cell(status.mfu, "{:.1%}"),
                "" if status.seconds_left is None else format_duration(status.seconds_left),
                cell(status.checkpoint, "{}"),
                status.health if status.state != "never started" else "",
            )
        )
    return format_table(rows)


def _total_steps(folder: Path) -> int | None:
    try:
        content = json.loads((folder / RUN_CONFIG_NAME).read_text(encoding="utf-8"))
        return int(content["train"]["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _age(path: Path) -> float | None:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return None
