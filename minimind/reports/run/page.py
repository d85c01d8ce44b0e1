"""Draw the charts of runs into one page, and as pictures. The page is one file that fetches nothing."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2

from minimind.files import replace_file
from minimind.reports.run.charts import STYLES, draw_chart, draw_expert_load, list_charts, plot_area, to_png, to_svg
from minimind.reports.run.data import AXES, RunData, find_differences
from minimind.units import format_duration

TEMPLATE = Path(__file__).with_name("page.html")
MOST_EVENTS = 40


def compose_page(runs: Sequence[RunData]) -> str:
    """The whole page."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    environment.filters |= {"duration": format_duration, "json": json.dumps}
    charts: list[dict[str, Any]] = []  # each with its SVG by axis
    areas = {}
    for chart in list_charts(runs):
        figures = {axis: figure for axis in AXES if (figure := draw_chart(chart, runs, axis)) is not None}
        if figures:
            svgs = {axis: to_svg(figure, f"{chart.key}-{axis}") for axis, figure in figures.items()}
            charts.append({"key": chart.key, "title": chart.title, "svgs": svgs})
            # Read after the drawing, which lays the figure out.
            places = {axis: plot_area(figure) for axis, figure in figures.items()}
            areas[chart.key] = {"curves": chart.curves, "areas": places}
    for number, run in enumerate(runs):
        if (figure := draw_expert_load(run)) is not None:
            svgs = {"always": to_svg(figure, f"experts-{number}")}
            charts.append({"key": None, "title": f"Expert load of {run.name}", "svgs": svgs})
    told = {run.name: [event for event in run.events if event.event != "save"] for run in runs}
    numbers = [
        {"name": run.name, "every": run.every, "curves": run.curves, "events": [asdict(event) for event in run.events]}
        for run in runs
    ]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        runs=runs,
        styles=STYLES,
        axes=AXES,
        charts=charts,
        differences=find_differences(runs),
        events=[(name, event) for name, events in told.items() for event in events[-MOST_EVENTS:]],
        left_out=sum(max(0, len(events) - MOST_EVENTS) for events in told.values()),
        # No browser takes it for markup.
        numbers=json.dumps({"runs": numbers, "charts": areas}, allow_nan=False).replace("<", "\\u003c"),
    )


def write_pictures(runs: Sequence[RunData], folder: Path) -> int:
    """Write a PNG of each chart by step, and of each run's expert load; their number."""
    folder.mkdir(exist_ok=True)
    drawn = {chart.key: draw_chart(chart, runs, "step") for chart in list_charts(runs)}
    drawn |= {f"experts_{number}": draw_expert_load(run) for number, run in enumerate(runs)}
    pictures = {name: to_png(figure) for name, figure in drawn.items() if figure is not None}
    for name, picture in pictures.items():
        replace_file(folder / f"{name}.png", picture)
    return len(pictures)
