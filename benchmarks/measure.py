"""What all benchmarks share: claims with targets, the table, the JSON file, and what machine it was.

Measures nothing itself.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "out"
# A benchmark is started as a file, so the repository is not on the path; every one of them imports this module first.
sys.path.insert(0, str(ROOT))

_PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "sentencepiece", "tokenizers")


@dataclass(frozen=True)
class Claim:
    """One line of the table: what is claimed, what was found.

    `values` are the repeats, in the target's unit: the median counts. `target` None: measured, nothing promised.
    """

    name: str
    values: tuple[float, ...]
    target: float | None = None
    at_least: bool = True
    unit: str = ""
    note: str = ""

    @property
    def passed(self) -> bool | None:
        """Whether the median reaches the target; None without a target."""
        if self.target is None:
            return None
        median = statistics.median(self.values)
        return median >= self.target if self.at_least else median <= self.target

    def to_dict(self) -> dict[str, Any]:
        """The figures that the table shows."""
        return {
            "claim": self.name,
            "target": self.target,
            "at_least": self.at_least,
            "unit": self.unit,
            "median": statistics.median(self.values),
            "min": min(self.values),
            "max": max(self.values),
            "repeats": len(self.values),
            "passed": self.passed,
            "note": self.note,
        }


def core_threads() -> dict[str, str]:
    """Environment of a program that has the whole machine; a value that is set already is kept."""
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))}


def ratios(above: Sequence[float], below: Sequence[float]) -> tuple[float, ...]:
    """Round by round, one over the other: what a busy machine does to both at once falls out."""
    return tuple(a / b for a, b in zip(above, below, strict=True))


def environment() -> dict[str, Any]:
    """Date, device, cores, load and versions: what a figure is worth nothing without."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "device": device_name(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": versions,
        "threads": os.environ.get("OMP_NUM_THREADS", "torch's default"),
    }


def computes_in_bf16() -> bool:
    """Whether the device that trains here has products in bf16: without them bf16 is float32 and a rounding."""
    import torch

    from minimind.model.kernels.matmul import multiplies

    return torch.cuda.is_bf16_supported() if torch.cuda.is_available() else multiplies(torch.bfloat16)


def device_name() -> str:
    """The accelerator's name, or "cpu"."""
    import torch  # slow to import, and some benchmarks are about just that

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def cpu_name() -> str:
    """The processor as the kernel names it, and the instruction sets that decide its speed here."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags", "").split()
    sets = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    family = f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
    return f"{fields.get('model name', platform.processor())} ({family}; {' '.join(sets)})"


def report(
    script: str, where: dict[str, Any], claims: Sequence[Claim], measured: dict[str, Any], output: Path | None = None
) -> None:
    """Print the table of one benchmark and write its JSON; `where` is the `environment` taken at the start."""
    rows = [claim.to_dict() for claim in claims]
    print(
        f"{script}: {where['cores']} cores, {where['cpu']}, {where['device']}, load {where['load_at_start']} at start"
    )
    print(format_table(rows))
    path = output or OUT / f"{Path(script).stem}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"script": Path(script).name, "environment": where, "claims": rows, "measured": measured}
    path.write_text(json.dumps(content, indent=1) + "\n")


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: claim, target, median, min, max, how much of the target was reached, and whether that is enough."""
    lines = [
        "| Claim | Target | Median | Min | Max | Reached / target | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sign, unit = (">=" if row["at_least"] else "<="), f" {row['unit']}" if row["unit"] else ""
        target = "" if row["target"] is None else f"{sign} {_figure(row['target'])}{unit}"
        share = "" if not row["target"] else f"{row['median'] / row['target']:.2f}"
        verdict = {True: "pass", False: "NOT REACHED", None: ""}[row["passed"]]
        figures = " | ".join(_figure(row[key]) for key in ("median", "min", "max"))
        name = row["claim"] + (f" ({row['note']})" if row["note"] else "")
        lines.append(f"| {name} | {target} | {figures} | {share} | {verdict} |")
    return "\n".join(lines)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
