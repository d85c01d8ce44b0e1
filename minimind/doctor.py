"""Can this machine train? `python -m minimind.doctor` prints a line for each check, and the fix where one fails.

Changes nothing, unless `--build` compiles an op. Exit code 1 when something will not work. `--prove` trains
instead, and writes what it has found.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from minimind.cli import parse_flags
from minimind.errors import run_main
from minimind.reports.doctor import machine, software
from minimind.reports.doctor.check import Check
from minimind.reports.doctor.prove import prove
from minimind.schema import ABOVE_0


@dataclass(frozen=True)
class _Flags:
    """Check whether this machine can train; exit code 1 when something will not work."""

    run_dir: Path = Path(".")
    """Where runs will be written: its disk is checked."""
    build: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Compile this op of DeepSpeed, such as cpu_adam, and load it; may be given several times."""
    prove: bool = False
    """Train instead: equality with the CPU, a resume, memory beside the plan, speed."""
    minutes: Annotated[float, ABOVE_0] = 10.0
    """With prove: time for all runs."""
    output: Path = Path("prove")
    """With prove: folder for prove.json and prove.md."""


def main(args: Sequence[str] | None = None) -> int:
    """Print the checks; returns the exit code."""
    flags = parse_flags(_Flags, args, prog="python -m minimind.doctor")
    if flags.prove:
        return prove(flags.minutes, flags.output)
    groups: dict[str, Callable[[], list[Check]]] = {
        "software": software.check_versions,
        "accelerator": software.check_accelerator,
        "DeepSpeed's ops": lambda: software.check_ops(flags.build),
        "communication": software.check_communication,
        "launchers": machine.check_launchers,
        "machine": lambda: machine.check_machine(flags.run_dir),
    }
    found: list[Check] = []
    for title, run_checks in groups.items():
        print(f"{title}:")
        found += (checks := run_checks())
        print(*checks, sep="\n", flush=True)
    bad, warnings = (sum(check.status == status for check in found) for status in ("bad", "warn"))
    summary = f"{bad} will not work" if bad else "fit to train"
    print(f"{summary}; warnings: {warnings}" if warnings else summary)
    return int(bad > 0)


if __name__ == "__main__":
    run_main(main)
