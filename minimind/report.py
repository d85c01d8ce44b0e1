"""Report on runs in one HTML file: `python -m minimind.report RUN... --output FILE`

Curves of several runs on the same axes by step, tokens and hours, events, and settings that differ. Reads only run
folders.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from minimind.cli import parse_flags
from minimind.errors import UserError, run_main
from minimind.files import replace_file
from minimind.reports.run.charts import STYLES
from minimind.reports.run.data import name_runs, read_run
from minimind.reports.run.page import compose_page, write_pictures


@dataclass(frozen=True)
class _Flags:
    """Report on runs: curves, events, differences; one HTML file and a PNG of each chart."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders, compared in this order."""
    output: Path = Path("report.html")
    """The file to write; PNGs go into a folder of its name beside it."""
    png: bool = True
    """Write a PNG of each chart."""


def main(args: Sequence[str] | None = None) -> int:
    """Write the report and say where."""
    flags = parse_flags(_Flags, args, prog="python -m minimind.report")
    if not flags.runs:
        raise UserError("no run given; pass run folders, such as runs/mine")
    if len(flags.runs) > len(STYLES):
        raise UserError(f"{len(flags.runs)} runs: at most {len(STYLES)} can be told apart in one chart")
    runs = [read_run(run, name) for run, name in zip(flags.runs, name_runs(flags.runs), strict=True)]
    try:
        flags.output.parent.mkdir(parents=True, exist_ok=True)
        replace_file(flags.output, compose_page(runs))
        print(f"wrote {flags.output}")
        if flags.png:
            folder = flags.output.with_suffix("")
            print(f"wrote {folder}/: {write_pictures(runs, folder)} pictures")
    except OSError as error:
        raise UserError(f"output {flags.output}: {error.strerror}; give a path that can be written") from None
    return 0


if __name__ == "__main__":
    run_main(main)
