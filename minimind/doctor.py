"""Is this machine fit to train? `python -m minimind.doctor`: a line for each thing, a verdict, and the cure.

Looks at versions, the accelerator, what DeepSpeed's ops need, communication, launchers, limits, memory and disk.
Changes nothing, unless `--build` asks for an op to be compiled. Exit code 1 when something will not work.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from minimind.cli import parse_flags
from minimind.errors import run_main
from minimind.reports.doctor import machine as health_machine
from minimind.reports.doctor import software as health_software
from minimind.reports.doctor.finding import Finding


@dataclass(frozen=True)
class _Flags:
    """Look whether this machine is fit to train; exit code 1 when something will not work."""

    run_dir: Path = Path(".")
    """Where runs are going to be written: its disk is looked at."""
    build: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Compile this op of DeepSpeed, such as cpu_adam, and see it load; may be given several times."""


def main(args: Sequence[str] | None = None) -> int:
    """Print the findings; gives the exit code."""
    flags = parse_flags(
        _Flags, sys.argv[1:] if args is None else args, default=_Flags(), prog="python -m minimind.doctor"
    )
    groups: tuple[tuple[str, Callable[[], list[Finding]]], ...] = (
        ("software", health_software.check_versions),
        ("accelerator", health_software.check_accelerator),
        ("DeepSpeed's ops", lambda: health_software.check_ops(flags.build)),
        ("communication", health_software.check_communication),
        ("launchers", health_machine.check_launchers),
        ("machine", lambda: health_machine.check_machine(flags.run_dir)),
    )
    found: list[Finding] = []
    for title, check in groups:
        print(f"{title}:")
        for finding in check():
            print(finding.line(), flush=True)
            found.append(finding)
    bad = sum(finding.verdict == "bad" for finding in found)
    warnings = sum(finding.verdict == "warn" for finding in found)
    verdict = f"{bad} will not work" if bad else "fit to train"
    print(f"{verdict}; warnings: {warnings}" if warnings else verdict)
    return int(bad > 0)


if __name__ == "__main__":
    run_main(main)
