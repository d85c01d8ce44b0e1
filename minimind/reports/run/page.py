"""The report's page: HTML around the charts, the tables, and the numbers themselves for whoever reads the file.

One file, without a single address outside it, and a policy that forbids the browser to fetch any. Draws nothing and
reads nothing.
"""

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from minimind.reports.run.charts import AXIS_NAMES, STYLES, Chart
from minimind.reports.run.data import AXES, RunData, find_differences
from minimind.units import format_duration

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_SHAPES = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "x": "✕"}
_MOST_EVENTS = 40

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1320px; padding: 16px; color: #1a1a1a; background: #fff;
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 4px; } h2 { font-size: 1.15rem; margin: 28px 0 8px; }
.axes { position: sticky; top: 0; z-index: 1; background: #fff; padding: 8px 0; border-bottom: 1px solid #ccc;
  display: flex; flex-wrap: wrap; gap: 4px 16px; align-items: center; }
.axes label { padding: 6px 4px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 16px;
  margin-top: 16px; }
figure { margin: 0; border: 1px solid #e2e2e2; border-radius: 6px; padding: 8px; min-width: 0; }
figure svg { width: 100%; height: auto; display: block; touch-action: pan-y; }
figure .plot { display: none; }
body[data-axis="step"] .plot.step, body[data-axis="tokens"] .plot.tokens, body[data-axis="hours"] .plot.hours,
  .plot.always { display: block; }
figcaption { min-height: 1.5em; font-size: 13px; color: #333; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid #e2e2e2; vertical-align: top; }
td.other { font-weight: 700; background: #fff3c4; padding-left: 6px; }
td.other::before { content: "≠ "; }
.num { text-align: right; } .key { white-space: nowrap; } .muted { color: #555; }
@media print { .axes { position: static; } figure { break-inside: avoid; } }
"""

_SCRIPT = """
const data = JSON.parse(document.getElementById("report-data").textContent);
for (const input of document.querySelectorAll("input[name=axis]"))
  input.addEventListener("change", () => { document.body.dataset.axis = input.value; });
function show(value) {
  if (!Number.isFinite(value)) return "";
  const size = Math.abs(value);
  return size >= 1e5 || (size && size < 1e-3) ? value.toExponential(3) : String(+value.toPrecision(5));
}
function nearest(places, wanted) {
  let low = 0, high = places.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (places[middle] <= wanted) low = middle; else high = middle;
  }
  return wanted - places[low] < places[high] - wanted ? low : high;
}
for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const chart = data.charts[figure.dataset.chart], caption = figure.querySelector("figcaption");
  const read = (event) => {
    const axis = document.body.dataset.axis, area = chart.areas[axis];
    const box = figure.querySelector(".plot." + axis + " svg").getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width - area.left) / (area.right - area.left);
    if (share < 0 || share > 1) { caption.textContent = ""; return; }
    const place = area.low + share * (area.high - area.low), words = [];
    let at = null;
    for (const run of data.runs) for (const name of chart.curves) {
      const curve = run.curves[name];
      if (!curve) continue;
      const index = nearest(curve[axis], place);
      at = at === null ? curve[axis][index] : at;
      words.push(run.name + " " + show(curve.value[index]));
    }
    caption.textContent = axis + " " + show(at) + ": " + words.join(" · ");
  };
  figure.addEventListener("pointermove", read);
  figure.addEventListener("pointerdown", read);
  figure.addEventListener("pointerleave", () => { caption.textContent = ""; });
}
document.body.dataset.ready = "yes";
"""


@dataclass(frozen=True)
class Drawing:
    """A chart as drawn: its SVG by axis ("" where it has none), and where its axes stand."""

    chart: Chart
    svgs: dict[str, str]
    areas: dict[str, dict[str, Any]]


def compose_page(runs: Sequence[RunData], drawings: Sequence[Drawing]) -> str:
    """The whole page."""
    names = ", ".join(run.name for run in runs)
    choices = "".join(
        f'<label><input type="radio" name="axis" value="{axis}"{" checked" if axis == "step" else ""}> '
        f"{AXIS_NAMES[axis]}</label>"
        for axis in AXES
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<link rel="icon" href="data:,">
<title>{html.escape(names)}</title>
<style>{_STYLE}</style>
</head>
<body data-axis="step">
<h1>{"Comparison of runs" if len(runs) > 1 else "Report of a run"}</h1>
<div class="muted">{html.escape(names)}</div>
<h2>Where they stand</h2>
<div class="scroll">{_summary(runs)}</div>
<div class="axes" role="radiogroup" aria-label="horizontal axis">{choices}</div>
<div class="charts">{"".join(_figure(drawing) for drawing in drawings)}</div>
<p class="muted">▲ at the foot: a checkpoint was saved. R: resumed. !: an alarm. Thin lines: every value; thick: a
running mean.{_sparse(runs)}</p>
{_differences(runs)}
<h2>Events</h2>
<div class="scroll">{_events(runs)}</div>
<script type="application/json" id="report-data">{_embed(runs, drawings)}</script>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _embed(runs: Sequence[RunData], drawings: Sequence[Drawing]) -> str:
    """The numbers as JSON that no browser can take for markup."""
    content = {
        "runs": [
            {
                "name": run.name,
                "every": run.every,
                "curves": {name: asdict(curve) for name, curve in run.curves.items()},
                "events": [asdict(event) for event in run.events],
            }
            for run in runs
        ],
        "charts": {
            drawing.chart.key: {"curves": drawing.chart.curves, "areas": drawing.areas}
            for drawing in drawings
            if drawing.areas
        },
    }
    return json.dumps(content, allow_nan=False).replace("<", "\\u003c")


def _figure(drawing: Drawing) -> str:
    plots = "".join(f'<div class="plot {axis or "always"}">{svg}</div>' for axis, svg in drawing.svgs.items())
    key = f' data-chart="{drawing.chart.key}"' if drawing.areas else ""
    return f'<figure{key} aria-label="{html.escape(drawing.chart.title)}">{plots}<figcaption></figcaption></figure>'


def _summary(runs: Sequence[RunData]) -> str:
    head = ("run", "steps", "tokens", "time", "loss", "best evaluation", "tokens/s", "MFU", "alarms")
    rows = []
    for number, run in enumerate(runs):
        color, _, marker = STYLES[number % len(STYLES)]
        evaluation = run.curves.get("eval_loss")
        loss, mfu = run.curves.get("loss"), run.last.get("mfu")
        cells = (
            f"{run.last['step']:,}",
            f"{run.last.get('tokens_seen', 0):,}",
            format_duration(loss.hours[-1] * 3600) if loss else "",
            f"{loss.value[-1]:.4f}" if loss else "",
            f"{min(evaluation.value):.4f}" if evaluation else "",
            f"{run.last.get('tokens_per_second', 0):,.0f}",
            f"{mfu:.1%}" if isinstance(mfu, float) else "",
            str(sum(event.event == "alarm" for event in run.events)),
        )
        name = f'<span style="color:{color}">{_SHAPES[marker]}</span> {html.escape(run.name)}'
        rows.append(f'<td class="key">{name}</td>' + "".join(f'<td class="num">{cell}</td>' for cell in cells))
    return _table(head, rows, numeric_from=1)


def _table(head: Sequence[str], rows: Sequence[str], numeric_from: int | None = None) -> str:
    cells = "".join(
        f"<th{' class=num' if numeric_from is not None and i >= numeric_from else ''}>{html.escape(name)}</th>"
        for i, name in enumerate(head)
    )
    return f"<table><tr>{cells}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _differences(runs: Sequence[RunData]) -> str:
    if len(runs) < 2:
        return ""
    differences = find_differences(runs)
    if not differences:
        return "<h2>Settings</h2><p>All settings are the same.</p>"
    rows = []
    for name, values in differences.items():
        cells = "".join(
            f'<td class="{"other" if value != values[0] else "same"}">{html.escape(_show(value))}</td>'
            for value in values
        )
        rows.append(f'<td class="key">{html.escape(name)}</td>{cells}')
    head = ("setting", *(run.name for run in runs))
    return (
        "<h2>Settings that differ</h2><p class=muted>≠ and a yellow ground: not as in the first run.</p>"
        f'<div class="scroll">{_table(head, rows)}</div>'
    )


def _show(value: Any) -> str:
    return "not set" if value is None else value if isinstance(value, str) else json.dumps(value)


def _events(runs: Sequence[RunData]) -> str:
    rows, left_out = [], 0
    for run in runs:
        told = [event for event in run.events if event.event != "save"]
        left_out += max(0, len(told) - _MOST_EVENTS)
        for event in told[-_MOST_EVENTS:]:
            kind = f"{event.event}: {event.kind}" if event.kind else event.event
            cells = (run.name, f"{event.step:,}", kind, event.message)
            rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    more = f"<p class=muted>{left_out} earlier ones are in events.jsonl.</p>" if left_out else ""
    return _table(("run", "step", "event", ""), rows) + more if rows else "<p>None were written.</p>"


def _sparse(runs: Sequence[RunData]) -> str:
    parts = [f"{run.name}: one step in {run.every}" for run in runs if run.every > 1]
    return html.escape(f" Shown of {', '.join(parts)}.") if parts else ""
