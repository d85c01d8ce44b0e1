"""The curves of a report, drawn by matplotlib as SVG for the page and as PNG for papers.

Runs differ in dashes and markers as well as in colour, so that a print without colour can be read.
"""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from minimind.reports.run.data import AXES, RunData

# Okabe and Ito's colours, told apart with every kind of colour vision; dashes; markers and their sign in the page.
STYLES: tuple[tuple[str, Any, str, str], ...] = (
    ("#0072B2", "-", "o", "●"),
    ("#D55E00", (0, (5, 2)), "s", "■"),
    ("#009E73", (0, (1, 1.5)), "^", "▲"),
    ("#CC79A7", (0, (5, 2, 1, 2)), "D", "◆"),
    ("#56B4E9", (0, (8, 3)), "v", "▼"),
    ("#000000", (0, (3, 1, 1, 1, 1, 1)), "x", "✕"),
)
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
}


class Chart(NamedTuple):
    """A chart of one or two curves of every run, or of one for each source of a mixture."""

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


def list_charts(runs: Sequence[RunData]) -> list[Chart]:
    """`CHARTS`, and of mixtures those by source: the keys of their curves are `FIGURE/SOURCE`."""
    keys = sorted({key for run in runs for key in run.curves if "/" in key})
    titles = {
        "source_loss": ("Training loss by source", "nats a token"),
        "eval_source_loss": ("Evaluation loss by source", "nats a token"),
        "source_tokens": ("Tokens read by source", "tokens"),
    }
    charts = list(CHARTS)
    for figure, (title, unit) in titles.items():
        if own := tuple(key for key in keys if key.startswith(f"{figure}/")):
            charts.append(Chart(figure, title, own, unit))
    return charts


def draw_chart(chart: Chart, runs: Sequence[RunData], axis: str) -> Figure | None:
    """A figure of one chart over one axis; None if no run has it."""
    if not any(key in run.curves for run in runs for key in chart.curves):
        return None
    with mpl.rc_context(_SETTINGS):
        # As wide as a phone, so letters keep their size there.
        figure = Figure(figsize=(5.4, 3.5), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(AXES[axis])
        axes.set_ylabel(chart.unit)
        axes.set_title(chart.title, loc="left", fontsize=11, fontweight="bold")
        if chart.log:
            axes.set_yscale("log")
        elif chart.unit in ("bytes", "tokens", "tokens/s"):
            axes.yaxis.set_major_formatter(EngFormatter())
        if axis == "tokens":
            axes.xaxis.set_major_formatter(EngFormatter())
        for number, run in enumerate(runs):
            own = [key for key in chart.curves if key in run.curves]
            for key in own:
                _draw_curve(axes, run, key, axis, number, label=run.name if key == own[0] else None)
            _draw_events(axes, run, axis, number)
        figure.legend(loc="outside lower left", ncols=min(3, len(runs)), frameon=False, fontsize=9, handlelength=3)
    return figure


def _draw_curve(axes: Any, run: RunData, key: str, axis: str, number: int, *, label: str | None) -> None:
    color, dashes, marker, _ = STYLES[number]
    places, values = run.curves[key][axis], run.curves[key]["value"]
    if (key == "loss" or key.startswith("source_loss/")) and len(values) > 40:
        axes.plot(places, values, color=color, linewidth=0.5, alpha=0.3)
        values = smooth(values)
    if "/" in key:  # of a source, which stands at its end
        name, at = key.partition("/")[2], (places[-1], values[-1])
        axes.annotate(name, at, (3, 0), textcoords="offset points", color=color, fontsize=8, va="center")
    stride = max(1, len(values) // 8)  # a marker here and there, in different places for each run
    axes.plot(
        places, values, color=color, linestyle=dashes, linewidth=1.5, label=label,
        marker=marker, markersize=4, markevery=(number * stride // 4, stride),
    )  # fmt: skip


def _draw_events(axes: Any, run: RunData, axis: str, number: int) -> None:
    """Saves as small triangles at the foot, resumes as dashed lines with R, alarms as dotted lines with !."""
    color, at = STYLES[number][0], axes.get_xaxis_transform()
    for event in run.events:
        if event.event not in ("save", "resume", "alarm"):
            continue
        place = place_of(run, event.step, axis)
        if event.event == "save":  # runs that save at the same steps are stacked
            height = 0.015 + 0.03 * number
            axes.plot([place], [height], "^", markersize=4, color=color, transform=at, clip_on=False)
            continue
        sign, dashes = ("!", ":") if event.event == "alarm" else ("R", "--")
        axes.axvline(place, color=color, linestyle=dashes, linewidth=1.0)
        box = {"facecolor": "white", "edgecolor": color, "pad": 1.0}
        axes.text(place, 0.98, sign, color=color, transform=at, ha="center", va="top", weight="bold", bbox=box)


def place_of(run: RunData, step: int, axis: str) -> float:
    """The place of a step on an axis: that of the nearest shown step before it."""
    curve = run.curves.get("loss", {"step": []})
    earlier = sum(shown <= step for shown in curve["step"])
    return step if axis == "step" else curve[axis][earlier - 1] if earlier else 0.0


def smooth(values: Sequence[float], share: float = 0.03) -> list[float]:
    """An exponential mean over about `share` of the curve, without a bias towards zero at its start."""
    keep = 1 - 1 / max(2.0, share * len(values))
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(mean / weight)
    return smoothed


def draw_expert_load(run: RunData) -> Figure | None:
    """The load of each expert of each layer over the last steps, with the figures written in if there is room."""
    if not run.expert_load:
        return None
    with mpl.rc_context({**_SETTINGS, "axes.grid": False}):
        figure = Figure(figsize=(5.4, max(1.8, min(6.0, 0.9 + 0.3 * len(run.expert_load)))), layout="constrained")
        axes = figure.add_subplot(xlabel="expert", ylabel="expert layer")
        axes.set_title(f"Expert load at the end: {run.name}", loc="left", fontsize=11, fontweight="bold")
        figure.colorbar(
            axes.imshow(run.expert_load, cmap="Greys", vmin=0, vmax=2, aspect="auto"), label="1 = even load"
        )
        for row, loads in enumerate(run.expert_load if len(run.expert_load[0]) <= 10 else []):
            for column, load in enumerate(loads):
                shade = "white" if load > 1.2 else "black"
                axes.text(column, row, f"{load:.2f}", ha="center", va="center", fontsize=8, color=shade)
    return figure


def to_svg(figure: Figure, key: str) -> str:
    """The figure as an SVG element; `key` keeps its inner names apart from those of other figures on the page."""
    text = io.StringIO()
    with mpl.rc_context({**_SETTINGS, "svg.hashsalt": key}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    for reference in ('id="', 'href="#', "url(#"):
        svg = svg.replace(reference, f"{reference}{key}-")
    return svg[svg.index("<svg") :]


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG of 200 dots an inch."""
    data = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(data, format="png", dpi=200)
    return data.getvalue()


def plot_area(figure: Figure) -> dict[str, float]:
    """Place of the axes in the figure, in shares of its width, and their range: to read values by pointer."""
    axes = figure.axes[0]
    (low, high), box = axes.get_xlim(), axes.get_position()
    return {"left": box.x0, "right": box.x1, "low": low, "high": high}
