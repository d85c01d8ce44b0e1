"""A profile of a few steps: a trace for Chrome's viewer and a short table, by each rank for itself.

The parts of a step are the ranges that `StepTimer` names.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from minimind.units import format_table

FOLDER = "profile"
PREFIX = "step."
PARTS = ("rollout", "data", "forward", "backward", "optimizer")
STEPS_BEFORE = 3
"""Steps before the profile: allocations, kernels that are compiled, the profiler's own start."""


class StepProfiler:
    """Profiles `steps` steps of one rank (0: none) into `profile/rank_0000.json` and `.txt` of the run's folder."""

    def __init__(self, run_dir: Path, rank: int, steps: int, device: torch.device) -> None:
        self._base = run_dir / FOLDER / f"rank_{rank:04d}"
        self._steps = steps
        self._table: str | None = None
        self._profile: profile | None = None
        if steps:
            self._profile = profile(
                activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda"),
                schedule=schedule(wait=STEPS_BEFORE - 1, warmup=1, active=steps, repeat=1),
                on_trace_ready=self._write,
            )
            self._profile.start()

    def step(self) -> str | None:
        """Mark the end of a step; the table, after the last step of the profile."""
        if self._profile is None:
            return None
        self._profile.step()
        if self._table is not None:
            self.close()
        return self._table

    def close(self) -> None:
        """Stop. A run that ended within the profile writes the steps so far."""
        if self._profile is not None:
            found, self._profile = self._profile, None
            found.stop()

    def _write(self, found: Any) -> None:
        self._base.parent.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(self._base.with_suffix(".json")))
        self._table = format_parts(sum_parts(found.events()), self._steps)
        self._base.with_suffix(".txt").write_text(self._table + "\n", encoding="utf-8")


def sum_parts(events: Iterable[Any]) -> dict[str, float]:
    """Seconds of each part, of communication (inside the parts), and idle between the parts."""
    totals = dict.fromkeys((*PARTS, "communication"), 0.0)
    begin, end = float("inf"), 0.0
    events = list(events)
    # CUDA gives the range of a part twice: the host's, which ends when all is launched, and the device's own.
    own = {event.name for event in events if event.name.startswith(PREFIX) and event.device_type == DeviceType.CUDA}
    for event in events:
        span = event.time_range
        if event.name in own and event.device_type != DeviceType.CUDA:
            continue
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
    rows = [["part", "ms a step", "share"]]
    for name in (*PARTS, "idle", "communication"):
        rows.append([name, f"{totals[name] / steps * 1000:.2f}", f"{totals[name] / whole:.1%}"])
    rows[-1].append("(inside the other parts)")
    return format_table([[*row, ""][:4] for row in rows], "<>>")
