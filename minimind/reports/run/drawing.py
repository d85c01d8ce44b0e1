"""Draw a run's curves into one page or into pictures."""

from collections.abc import Sequence
from pathlib import Path

from minimind.files import replace_file
from minimind.reports.run.charts import CHARTS, Chart, draw_chart, draw_expert_load, plot_area, to_png, to_svg
from minimind.reports.run.data import AXES, RunData
from minimind.reports.run.page import Drawing


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
