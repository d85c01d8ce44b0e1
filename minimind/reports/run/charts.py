"""The curves of a report, drawn by matplotlib: as SVG for the page and as PNG for papers.

Each run has its own dashes and marker beside its colour, so that a print without colour can be read. Knows nothing of
files or pages.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from minimind.reports.run.data import RunData

# Okabe and Ito's colours, told apart with every kind of colour vision; dashes and markers for a print without any.
STYLES: tuple[tuple[str, Any, str], ...] = (
    ("#0072B2", "-", "o"),
    ("#D55E00", (0, (5, 2)), "s"),
    ("#009E73", (0, (1, 1.5)), "^"),
    ("#CC79A7", (0, (5, 2, 1, 2)), "D"),
    ("#56B4E9", (0, (8, 3)), "v"),
    ("#000000", (0, (3, 1, 1, 1, 1, 1)), "x"),
)
AXIS_NAMES = {"step": "optimizer step", "tokens": "tokens seen", "hours": "hours of training"}
SIZE = (5.4, 3.5)
"""Inches: on a phone the page is as wide, so letters keep their size."""
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
}


@dataclass(frozen=True)
class Chart:
    """What one chart shows."""

    key: str
    title: str
    curves: tuple[str, ...]
    unit: str = ""
    log: bool = False


CHARTS = (
    Chart("loss", "Training loss", ("loss",), "nats a token"),
    Chart("eval_loss", "Evaluation loss", ("eval_loss",), "nats a token"),
    Chart("lr", "Learning rate", ("lr",)),
    Chart("grad_norm", "Gradient norm, before clipping", ("grad_norm",), log=True),
    Chart("throughput", "Throughput", ("tokens_per_second",), "tokens/s"),
    Chart("memory", "Peak memory of rank 0", ("peak_memory_bytes",), "bytes"),
    Chart("expert_load", "Busiest and idlest expert", ("busiest_expert", "idlest_expert"), "1 = even load"),
    Chart("aux_loss", "Router loss", ("aux_loss",)),
    Chart("loss_scale", "Loss scale", ("loss_scale",), log=True),
)


def draw_chart(chart: Chart, runs: Sequence[RunData], axis: str) -> Figure | None:
    """A figure of one chart over one axis; None where no run has it."""
    if not any(name in run.curves for run in runs for name in chart.curves):
        return None
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        for number, run in enumerate(runs):
            _draw_run(axes, chart, run, number, axis)
        axes.set_xlabel(AXIS_NAMES[axis])
        axes.set_ylabel(chart.unit)
        axes.set_title(chart.title, loc="left", fontsize=11, fontweight="bold")
        if chart.log:
            axes.set_yscale("log")
        elif chart.unit in ("bytes", "tokens/s"):
            axes.yaxis.set_major_formatter(EngFormatter())
        if axis == "tokens":
            axes.xaxis.set_major_formatter(EngFormatter())
        for number, run in enumerate(runs):
            _draw_events(axes, run, number, axis)
        figure.legend(loc="outside lower left", ncols=min(3, len(runs)), frameon=False, fontsize=9, handlelength=3)
    return figure


def _draw_run(axes: Any, chart: Chart, run: RunData, number: int, axis: str) -> None:
    color, dashes, marker = STYLES[number % len(STYLES)]
    for position, name in enumerate(chart.curves):
        curve = run.curves.get(name)
        if curve is None:
            continue
        places, values = getattr(curve, axis), curve.value
        style = {"color": color, "linestyle": dashes, "marker": marker, "markersize": 4}
        if len(values) > 40 and name == "loss":
            axes.plot(places, values, color=color, linewidth=0.5, alpha=0.3)
            values = smooth(values)
        # A marker here and there, not in the same places for every run.
        stride = max(1, len(values) // 8)
        label = run.name if position == 0 else None
        axes.plot(places, values, label=label, linewidth=1.5, markevery=(number * stride // 4, stride), **style)


def _draw_events(axes: Any, run: RunData, number: int, axis: str) -> None:
    """Saves as small triangles at the foot, resumes as dashed lines with R, alarms as dotted lines with !."""
    color = STYLES[number % len(STYLES)][0]
    for event in run.events:
        place = place_of(run, event.step, axis)
        if place is None or event.event not in ("save", "resume", "alarm"):
            continue
        if event.event == "save":
            height = 0.015 + 0.03 * number  # runs that save at the same steps stand above one another
            axes.plot(
                [place],
                [height],
                marker="^",
                markersize=4,
                color=color,
                transform=axes.get_xaxis_transform(),
                linestyle="none",
                clip_on=False,
            )
            continue
        sign, dashes = ("!", ":") if event.event == "alarm" else ("R", "--")
        axes.axvline(place, color=color, linestyle=dashes, linewidth=1.0)
        axes.text(
            place,
            0.98,
            sign,
            color=color,
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="top",
            fontsize=9,
            fontweight="bold",
            bbox={"facecolor": "white", "edgecolor": color, "pad": 1.0},
        )


def place_of(run: RunData, step: int, axis: str) -> float | None:
    """Where a step stands on an axis; the nearest shown step before it."""
    if axis == "step":
        return step
    curve = run.curves.get("loss")
    if curve is None:
        return None
    earlier = [place for at, place in zip(curve.step, getattr(curve, axis), strict=True) if at <= step]
    return earlier[-1] if earlier else 0.0


def smooth(values: Sequence[float], share: float = 0.03) -> list[float]:
    """An exponential mean over about `share` of the curve, started without a bias towards zero."""
    keep = 1 - 1 / max(2.0, share * len(values))
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(mean / weight)
    return smoothed


def draw_expert_load(run: RunData) -> Figure | None:
    """The load of each expert of each layer over the last steps, with the figures written in where there is room."""
    if not run.expert_load:
        return None
    layers, experts = len(run.expert_load), len(run.expert_load[0])
    with mpl.rc_context({**_SETTINGS, "axes.grid": False}):
        figure = Figure(figsize=(SIZE[0], max(1.8, min(6.0, 0.9 + 0.3 * layers))), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(run.expert_load, cmap="Greys", vmin=0.0, vmax=2.0, aspect="auto")
        axes.set_xlabel("expert")
        axes.set_ylabel("expert layer")
        axes.set_title(f"Expert load at the end: {run.name}", loc="left", fontsize=11, fontweight="bold")
        figure.colorbar(image, label="1 = even load")
        if experts <= 10:
            for row, loads in enumerate(run.expert_load):
                for column, load in enumerate(loads):
                    shade = "white" if load > 1.2 else "black"
                    axes.text(column, row, f"{load:.2f}", ha="center", va="center", fontsize=8, color=shade)
    return figure


def to_svg(figure: Figure, key: str) -> str:
    """The figure as an SVG element; `key` keeps its inner names apart from those of other figures on the page."""
    text = io.StringIO()
    with mpl.rc_context({**_SETTINGS, "svg.hashsalt": key}):
        FigureCanvasSVG(figure)
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace('id="', f'id="{key}-').replace('href="#', f'href="#{key}-').replace(
        "url(#", f"url(#{key}-"
    )  # fmt: skip


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG of 200 dots an inch."""
    data = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(data, format="png", dpi=200)
    return data.getvalue()


def plot_area(figure: Figure) -> dict[str, Any]:
    """Where the axes stand in the figure, in shares of its width, and what they show: for reading values by pointer."""
    (axes, *_) = figure.axes
    box = axes.get_position()
    low, high = axes.get_xlim()
    return {"left": box.x0, "right": box.x1, "low": low, "high": high}
