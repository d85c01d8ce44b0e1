"""What the drawings are made with: a sheet, boxes, arrows, words in two languages, and an SVG that is always the same.

Text stays text in the file, so Chinese is drawn by the reader's own fonts; nothing is placed by the width of a glyph.
Knows nothing of what is drawn.
"""

import warnings
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

HERE = Path(__file__).resolve().parent
FONTS = (
    "'DejaVu Sans', 'Noto Sans CJK SC', 'Source Han Sans SC', 'PingFang SC', 'Microsoft YaHei', 'WenQuanYi Micro Hei'"
)
# Okabe and Ito's colours, told apart by every kind of eye; the pale ones are grounds for black text.
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#8c8c8c"
PALE = {BLUE: "#d6eaf5", ORANGE: "#fbebc8", GREEN: "#d3efe5", RED: "#f8ddcb", PURPLE: "#f5e2ec", GREY: "#eeeeee"}
RANKS = (BLUE, ORANGE, GREEN, PURPLE)

Point = tuple[float, float]
Rows = list[list[str]]

SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "minimind",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
}


class Words:
    """Says things in one language: `say("layer", "层")`."""

    def __init__(self, language: str) -> None:
        self.language = language

    def __call__(self, english: str, chinese: str) -> str:
        return chinese if self.language == "zh" else english


def sheet(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty sheet of so many inches, measured in tenths of an inch from its lower left corner."""
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width * 10), ylim=(0, height * 10))
    axes.set_axis_off()
    return figure, axes


def write(axes: Axes, x: float, y: float, text: str, size: float = 9, at: str = "center", **look: object) -> None:
    """One line of text; `at` says which part of it stands at x."""
    axes.text(x, y, text, ha=at, va="center", fontsize=size, **look)


def box(axes: Axes, x: float, y: float, width: float, height: float, *lines: str, color: str = GREY) -> None:
    """A rounded box with its corner at (x, y); the first line large, the others small."""
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.6", fc=PALE[color], ec=color)
    axes.add_patch(shape)
    step = 1.6
    top = y + height / 2 + step * (len(lines) - 1) / 2
    for number, words in enumerate(lines):
        write(axes, x + width / 2, top - step * number, words, 9 if number == 0 else 7.5)


def arrow(axes: Axes, start: Point, end: Point, color: str = "#444444", **look: object) -> None:
    """A straight arrow."""
    props = {"arrowstyle": "-|>", "color": color, "lw": 1.1, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops={**props, **look})


def line(axes: Axes, *points: Point) -> None:
    """A line with corners, for the way to an arrow."""
    axes.plot(*zip(*points, strict=True), color="#444444", lw=1.1)


def grid(
    axes: Axes, x: float, y: float, cells: list[list[str]], texts: list[list[str]] | None = None, size: float = 2.0
) -> None:
    """Squares of colours, row by row from the top, the upper left corner at (x, y)."""
    for i, row in enumerate(cells):
        for j, color in enumerate(row):
            corner = (x + j * size, y - (i + 1) * size)
            axes.add_patch(plt.Rectangle(corner, size, size, fc=color, ec="white", lw=1))
            if texts:
                write(
                    axes,
                    corner[0] + size / 2,
                    corner[1] + size / 2,
                    texts[i][j],
                    7,
                    color="white" if color == BLUE else "black",
                )


def svg(figure: Figure, path: Path) -> None:
    """Write the figure; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the reader's browser has it
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    text = path.read_text(encoding="utf-8")
    lines = (line.rstrip() for line in text.replace("'DejaVu Sans'", FONTS).splitlines())
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
