"""The status of runs, a line each, from any shell: `python -m minimind.status RUN...`

Reads only the run folders, also while they are written to; no process and no device is asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from minimind.cli import parse_flags
from minimind.errors import UserError, run_main
from minimind.reports.status import find_runs, read_status, status_table


@dataclass(frozen=True)
class _Flags:
    """Show the status of runs, a line each; reads only their folders."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders, or folders of them."""


def main(args: Sequence[str] | None = None) -> int:
    """Print a line for each run; exit code 1 where one failed or crashed."""
    flags = parse_flags(_Flags, args, prog="python -m minimind.status")
    if not flags.runs:
        raise UserError("no run given; pass run folders, such as runs/mine")
    found = [read_status(folder) for run in flags.runs for folder in find_runs(run)]
    print(status_table(found))
    return int(any(status.state in ("failed", "crashed") for status in found))


if __name__ == "__main__":
    run_main(main)
