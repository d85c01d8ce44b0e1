"""What a report shows of a run: its curves by step, tokens and hours, its events, its settings, from its folder alone.

Figures are kept exactly as metrics.jsonl has them; of a long run every k-th step is taken, and k is told. Draws
nothing.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind.errors import UserError
from minimind.training.record.events import Event, read_events
from minimind.training.record.run_files import DS_CONFIG_NAME, METRICS_NAME, RUN_CONFIG_NAME, read_records

MOST_POINTS = 1500
AXES = ("step", "tokens", "hours")
STEP_CURVES = ("loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_bytes", "aux_loss", "loss_scale")
EVAL_CURVES = ("eval_loss",)
LOAD_CURVES = ("busiest_expert", "idlest_expert")
UNTOLD_FIELDS = ("run_dir",)
"""Settings that differ between any two runs."""


@dataclass(frozen=True)
class Curve:
    """One figure over a run; the three axes and the values have one length."""

    step: list[int]
    tokens: list[int]
    hours: list[float]
    value: list[float]


@dataclass(frozen=True)
class RunData:
    """One run as a report shows it."""

    name: str
    curves: dict[str, Curve]
    events: list[Event]
    settings: dict[str, Any]
    """Flat, `train.lr` and `deepspeed.zero_optimization.stage`."""
    every: int
    """One step in so many is shown."""
    last: Mapping[str, Any]
    """The newest record of a step."""
    expert_load: list[list[float]]
    """Share of each expert over the last steps, a row for each layer of experts; 1 is an even load."""


def read_run(folder: Path, name: str) -> RunData:
    """Read a run's folder.

    Raises:
        UserError: it holds no step.
    """
    records = read_records(folder / METRICS_NAME)
    steps = [record for record in records if "loss" in record]
    if not steps:
        raise UserError(f"{folder}: no step in {METRICS_NAME}; give the --run-dir of a training")
    seconds = 0.0
    hours, tokens = {0: 0.0}, {0: 0}
    for record in steps:
        seconds += record.get("step_seconds") or 0.0
        hours[record["step"]] = seconds / 3600
        tokens[record["step"]] = record.get("tokens_seen") or 0
    every = max(1, math.ceil(len(steps) / MOST_POINTS))
    shown = steps[::every] if (len(steps) - 1) % every == 0 else [*steps[::every], steps[-1]]
    evaluations = [record for record in records if "eval_loss" in record]
    curves = {}
    for names, source in ((STEP_CURVES, shown), (EVAL_CURVES, evaluations)):
        for curve_name in names:
            points = [(record["step"], record.get(curve_name)) for record in source]
            kept = [(step, value) for step, value in points if _is_number(value)]
            if kept:
                curves[curve_name] = _curve(kept, tokens, hours)
    for position, curve_name in enumerate(LOAD_CURVES):
        loads = [
            (record["step"], _extremes(record["expert_load"])[position])
            for record in shown
            if record.get("expert_load")
        ]
        if loads:
            curves[curve_name] = _curve(loads, tokens, hours)
    return RunData(
        name=name,
        curves=curves,
        events=read_events(folder),
        settings=read_settings(folder),
        every=every,
        last=steps[-1],
        expert_load=_mean_load(steps[-50:]),
    )


def _curve(points: Sequence[tuple[int, Any]], tokens: Mapping[int, int], hours: Mapping[int, float]) -> Curve:
    steps = [step for step, _ in points]
    return Curve(
        step=steps,
        tokens=[tokens.get(step, 0) for step in steps],
        hours=[hours.get(step, 0.0) for step in steps],
        value=[value for _, value in points],
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _shares(layer: Sequence[float]) -> list[float]:
    even = sum(layer) / len(layer) or 1.0
    return [count / even for count in layer]


def _extremes(load: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Load of the busiest and of the idlest expert of all layers, 1 being an even one."""
    shares = [share for layer in load for share in _shares(layer)]
    return max(shares), min(shares)


def _mean_load(steps: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    loads = [record["expert_load"] for record in steps if record.get("expert_load")]
    if not loads:
        return []
    layers = zip(*loads, strict=True)
    return [_shares([sum(counts) for counts in zip(*layer, strict=True)]) for layer in layers]


def read_settings(folder: Path) -> dict[str, Any]:
    """Every setting of a run by its dotted name; what cannot be read is no setting."""
    settings: dict[str, Any] = {}
    for file, prefix in ((RUN_CONFIG_NAME, ""), (DS_CONFIG_NAME, "deepspeed.")):
        try:
            content = json.loads((folder / file).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        settings |= {prefix + key: value for key, value in flatten(content).items()}
    return settings


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def find_differences(runs: Sequence[RunData]) -> dict[str, list[Any]]:
    """The settings that not all runs share, with the value of each run (None where it has none)."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    values = {name: [run.settings.get(name) for run in runs] for name in names}
    return {
        name: found
        for name, found in values.items()
        if name.split(".")[-1] not in UNTOLD_FIELDS and any(value != found[0] for value in found)
    }


def name_runs(folders: Sequence[Path]) -> list[str]:
    """A name for each run: its folder's, with as many parents as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{folders[0]}: given more than once; give each run once")
