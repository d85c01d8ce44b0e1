"""A run for a report: its curves by step, tokens and hours, its events and settings, read from its folder alone.

Figures are exactly those of metrics.jsonl. Of a long run every k-th step is taken, and the page says so.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind.errors import UserError
from minimind.training.record.events import Event, read_events
from minimind.training.record.run_files import (
    DS_CONFIG_NAME,
    METRICS_NAME,
    RUN_CONFIG_NAME,
    Record,
    StepRecord,
    evaluations_of,
    figures_by_source,
    read_records,
    steps_of,
)

MOST_POINTS = 1500
AXES = {"step": "optimizer step", "tokens": "tokens seen", "hours": "hours of training"}
STEP_CURVES = ("loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_bytes", "aux_loss", "loss_scale")

Curve = dict[str, list[float]]  # places on each of AXES, and "value"


@dataclass(frozen=True)
class RunData:
    """One run as a report shows it."""

    name: str
    curves: dict[str, Curve]
    events: list[Event]
    settings: dict[str, Any]
    """By dotted name: `train.lr`, `deepspeed.zero_optimization.stage`."""
    every: int
    """One step in so many is shown."""
    last: StepRecord
    expert_load: list[list[float]]
    """Mean load of each expert over the last steps, a row for each layer of experts; 1 is an even load."""


def read_run(folder: Path, name: str) -> RunData:
    """Read a run's folder.

    Raises:
        UserError: it holds no step.
    """
    records = read_records(folder / METRICS_NAME)
    steps = steps_of(records)
    if not steps:
        raise UserError(f"{folder}: no step in {METRICS_NAME}; give the --run-dir of a training")
    seconds, tokens_and_hours = 0.0, {0: (0, 0.0)}
    for record in steps:
        seconds += record.get("step_seconds") or 0.0
        tokens_and_hours[record["step"]] = record.get("tokens_seen") or 0, seconds / 3600
    every = max(1, math.ceil(len(steps) / MOST_POINTS))
    shown = [record for i, record in enumerate(steps) if i % every == 0 or record is steps[-1]]
    points: dict[str, list[tuple[int, Any]]] = {
        key: [(record["step"], record.get(key)) for record in shown] for key in STEP_CURVES
    }
    points["eval_loss"] = [(record["step"], record.get("eval_loss")) for record in evaluations_of(records)]
    by_source: list[Record] = [*shown, *evaluations_of(records)]
    for item in by_source:
        for name, value in figures_by_source(item).items():
            points.setdefault(name, []).append((item["step"], value))
    loaded = [record for record in steps if record.get("expert_load")]  # of many experts, not in every line
    for record in loaded[:: max(1, math.ceil(len(loaded) / MOST_POINTS))]:
        load = [share for layer in _shares(record["expert_load"]) for share in layer]
        points.setdefault("busiest_expert", []).append((record["step"], max(load)))
        points.setdefault("idlest_expert", []).append((record["step"], min(load)))
    curves = {}
    for key, found in points.items():
        kept = [(step, *tokens_and_hours.get(step, (0, 0.0)), value) for step, value in found if value is not None]
        if kept:
            curves[key] = dict(zip((*AXES, "value"), map(list, zip(*kept, strict=True)), strict=True))
    last_loads = [record["expert_load"] for record in steps[-50:] if record.get("expert_load")]
    totals = [[sum(counts) for counts in zip(*layer, strict=True)] for layer in zip(*last_loads, strict=True)]
    return RunData(name, curves, read_events(folder), read_settings(folder), every, steps[-1], _shares(totals))


def _shares(load: Sequence[Sequence[float]]) -> list[list[float]]:
    """The load of each expert of each layer, 1 being even."""
    return [[count * len(layer) / (sum(layer) or 1) for count in layer] for layer in load]


def read_settings(folder: Path) -> dict[str, Any]:
    """Every setting of a run by its dotted name; unreadable files are skipped."""
    settings: dict[str, Any] = {}
    for file, prefix in ((RUN_CONFIG_NAME, ""), (DS_CONFIG_NAME, "deepspeed.")):
        try:
            settings |= _flatten(json.loads((folder / file).read_text(encoding="utf-8")), prefix)
        except (OSError, ValueError):
            continue
    return settings


def _flatten(content: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def find_differences(runs: Sequence[RunData]) -> dict[str, list[Any]]:
    """The settings that differ between runs, with the value of each run (None: not set), other than their folders."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name != "train.run_dir")
    values = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def name_runs(folders: Sequence[Path]) -> list[str]:
    """A name for each run: its folder's, with as many parents as tell the runs apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{folders[0]}: given more than once; give each run once")
