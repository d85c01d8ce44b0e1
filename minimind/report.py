"""After a run: one HTML file with its curves, events and settings. `python -m minimind.report RUN... --output FILE`

Several runs stand on the same axes, by step, tokens and hours. The file needs no network; a folder beside it holds a
PNG of each chart. Reads only run folders.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from minimind.files import replace_file
from minimind.errors import UserError, run_main
from minimind.cli import parse_flags
from minimind.reports.run.charts import CHARTS, STYLES, Chart, draw_chart, draw_expert_load, plot_area, to_png, to_svg
from minimind.reports.run.data import AXES, RunData, name_runs, read_run
from minimind.reports.run.page import Drawing, compose_page


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
    flags = parse_flags(
        _Flags, sys.argv[1:] if args is None else args, default=_Flags(), prog="python -m minimind.report"
    )
    if not flags.runs:
        raise UserError("no run given; pass run folders, such as runs/mine")
    if len(flags.runs) > len(STYLES):
        raise UserError(f"{len(flags.runs)} runs: at most {len(STYLES)} can be told apart in one chart")
    runs = [read_run(run, name) for run, name in zip(flags.runs, name_runs(flags.runs), strict=True)]
    try:
        flags.output.parent.mkdir(parents=True, exist_ok=True)
        replace_file(flags.output, compose_page(runs, draw_all(runs)))
        print(f"wrote {flags.output}")
        if flags.png:
            print(f"wrote {write_pictures(runs, flags.output.with_suffix(''))} pictures")
    except OSError as error:
        raise UserError(f"output {flags.output}: {error.strerror}; give a path that can be written") from None
    return 0


def draw_all(runs: Sequence[RunData]) -> list[Drawing]:
    """Every chart that the runs have something for, over each axis."""
    drawings = []
    for chart in CHARTS:
        figures = {axis: draw_chart(chart, runs, axis) for axis in AXES}
        svgs = {axis: to_svg(figure, f"{chart.key}-{axis}") for axis, figure in figures.items() if figure is not None}
        if svgs:
            areas = {axis: plot_area(figure) for axis, figure in figures.items() if figure is not None}
            drawings.append(Drawing(chart, svgs, areas))
    for number, run in enumerate(runs):
        figure = draw_expert_load(run)
        if figure is not None:
            chart = Chart(f"experts-{number}", f"Expert load of {run.name}", ())
            drawings.append(Drawing(chart, {"": to_svg(figure, chart.key)}, {}))
    return drawings


def write_pictures(runs: Sequence[RunData], folder: Path) -> str:
    """A PNG of each chart by step, and of each run's expert load; what was written, in words."""
    folder.mkdir(exist_ok=True)
    figures = {chart.key: draw_chart(chart, runs, "step") for chart in CHARTS}
    figures |= {f"experts_{number}": draw_expert_load(run) for number, run in enumerate(runs)}
    written = 0
    for name, figure in figures.items():
        if figure is not None:
            replace_file(folder / f"{name}.png", to_png(figure))
            written += 1
    return f"{folder}/: {written}"


if __name__ == "__main__":
    run_main(main)
