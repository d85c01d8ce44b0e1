"""A profile of a few steps: a trace for Chrome's viewer and a short table, by each rank for itself.

torch's profiler does the work; the parts of a step are the ranges that `StepClock` names. Nothing is recorded outside
the steps that were asked for. Knows nothing of what a part does.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

FOLDER = "profile"
PREFIX = "step."
PARTS = ("data", "forward", "backward", "optimizer")
STEPS_BEFORE = 3
"""Steps that pass first: allocations, kernels that are built, the profiler's own start."""


class StepProfiler:
    """Profiles `steps` steps of one rank, then writes `profile/rank_0000.json` and `.txt` into the run's folder."""

    def __init__(self, run_dir: Path, rank: int, steps: int, device: torch.device) -> None:
        self._base = run_dir / FOLDER / f"rank_{rank:04d}"
        self._steps = steps
        self.table: str | None = None
        """What was found, once it was."""
        self._closed = False
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=STEPS_BEFORE - 1, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write,
        )
        self._profile.start()

    def step(self) -> None:
        """A step has ended."""
        self._profile.step()

    def close(self) -> None:
        """Stop; a run that ended before the last step of the profile writes what there is."""
        if not self._closed:
            self._closed = True
            self._profile.stop()

    def _write(self, found: Any) -> None:
        self._base.parent.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(self._base.with_suffix(".json")))
        self.table = format_parts(sum_parts(found.events()), self._steps)
        self._base.with_suffix(".txt").write_text(self.table + "\n", encoding="utf-8")


def sum_parts(events: Iterable[Any]) -> dict[str, float]:
    """Seconds of each part, of communication (inside the parts), and of the whole with what lies between the parts."""
    totals = dict.fromkeys((*PARTS, "communication"), 0.0)
    begin, end = float("inf"), 0.0
    for event in events:
        span = event.time_range
        if event.name.startswith(PREFIX):
            totals[event.name.removeprefix(PREFIX)] += span.elapsed_us() / 1e6
            begin, end = min(begin, span.start), max(end, span.end)
        elif event.name.startswith(("gloo:", "nccl:")):  # one such range for each collective
            totals["communication"] += span.elapsed_us() / 1e6
    totals["idle"] = max(0.0, (end - begin) / 1e6 - sum(totals[part] for part in PARTS)) if end else 0.0
    return totals


def format_parts(totals: dict[str, float], steps: int) -> str:
    """A line for each part: milliseconds a step, and its share."""
    whole = sum(totals[part] for part in (*PARTS, "idle")) or 1.0
    lines = [f"{'part':<16}{'ms a step':>10}{'share':>8}"]
    for name in (*PARTS, "idle", "communication"):
        note = "  (inside the others)" if name == "communication" else ""
        lines.append(f"{name:<16}{totals[name] / steps * 1000:>10.2f}{totals[name] / whole:>8.1%}{note}")
    return "\n".join(lines)
