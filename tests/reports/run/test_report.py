"""The report: its numbers are those of metrics.jsonl, its page opens in a browser without an error, and needs no
network."""

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from training_runs import flags_for, read_metrics, train

from minimind import report
from minimind.errors import UserError
from minimind.reports.run import data as report_data
from minimind.reports.run.charts import smooth
from minimind.reports.run.data import find_differences, name_runs, read_run
from minimind.training.record.events import write_event

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def runs(tiny_corpus, tmp_path_factory) -> list[Path]:
    """Three real runs, one of them with experts, one resumed; with an alarm, and a name that is markup."""
    folder = tmp_path_factory.mktemp("runs")
    settings: dict[str, dict[str, Any]] = {
        "plain": {"lr": 1e-3},
        "a <b> & c": {"lr": 3e-3, "stage": 2},
        "experts": {"use_moe": True, "num_experts": 4, "moe_intermediate_size": 16},
    }
    for name, others in settings.items():
        train(flags_for(tiny_corpus, folder / name, eval_every=2, **others))
    train(flags_for(tiny_corpus, folder / "plain", eval_every=2, lr=1e-3, steps=8))
    write_event(folder / "plain", "alarm", 5, "loss jumped </script>", "loss_spike")
    path = folder / "experts" / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        if "loss" in record:
            record.setdefault("expert_load", [[40, 10, 30, 20]])
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [folder / name for name in settings]


@pytest.fixture(scope="module")
def page(runs) -> Path:
    output = runs[0].parent / "out" / "report.html"
    assert report.main([*map(str, runs), "--output", str(output)]) == 0
    return output


def embedded(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="report-data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def check_numbers(data: dict[str, Any], runs: list[Path]) -> None:
    assert [run["name"] for run in data["runs"]] == [folder.name for folder in runs]
    for run, folder in zip(data["runs"], runs, strict=True):
        records = read_metrics(folder)
        steps = [record for record in records if "loss" in record]
        for name in ("loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_bytes"):
            curve = run["curves"][name]
            assert curve["step"] == [record["step"] for record in steps]
            assert curve["value"] == [record[name] for record in steps]
            assert curve["tokens"] == [record["tokens_seen"] for record in steps]
            hours = sum(record["step_seconds"] for record in steps) / 3600
            assert curve["hours"][-1] == pytest.approx(hours)
        evaluations = [record for record in records if "eval_loss" in record]
        assert run["curves"]["eval_loss"]["value"] == [record["eval_loss"] for record in evaluations]
        assert len(run["events"]) == len((folder / "events.jsonl").read_text().splitlines())


def browse(page: Path, profile: Path, width: int = 1280) -> tuple[str, list[str]]:
    """The page as the browser has it in the end, and what stood in its console."""
    assert CHROMIUM is not None
    result = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--enable-logging=stderr", f"--user-data-dir={profile}", f"--window-size={width},2000",
            "--virtual-time-budget=2000", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]


def test_the_page_holds_the_numbers_of_metrics_jsonl(page, runs):
    check_numbers(embedded(page.read_text()), runs)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1280, 390])
def test_three_runs_open_in_a_browser_without_an_error(page, runs, tmp_path, width):
    text, console = browse(page, tmp_path / "profile", width)
    assert console == []
    assert 'data-ready="yes"' in text, "the script did not reach its end"
    check_numbers(embedded(text), runs)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_an_error_in_the_console_would_be_seen(page, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace("document.body.dataset.ready", "document.nothing.ready"))
    text, console = browse(broken, tmp_path / "profile")
    assert len(console) == 1 and 'data-ready="yes"' not in text


class _Addresses(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [
            value or "" for name, value in attrs if name.split(":")[-1] in ("src", "href", "srcset", "action", "data")
        ]


def test_the_page_names_no_address_outside_itself(page):
    parser = _Addresses()
    parser.feed(page.read_text())
    assert parser.found and all(address.startswith(("#", "data:")) for address in parser.found)
    assert "Content-Security-Policy" in page.read_text() and "@import" not in page.read_text()


def test_names_are_text_and_not_markup(page):
    text = page.read_text()
    assert "a <b> & c" not in re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert "a &lt;b&gt; &amp; c" in text and "jumped &lt;/script&gt;" in text


def test_every_identifier_of_the_page_is_there_once(page):
    identifiers = re.findall(r'\bid="([^"]+)"', page.read_text())
    assert len(identifiers) == len(set(identifiers))


def test_each_chart_is_a_picture_too(page):
    pictures = sorted(path.name for path in page.with_suffix("").iterdir())
    assert pictures == [
        "aux_loss.png", "eval_loss.png", "expert_load.png", "experts_2.png", "grad_norm.png", "loss.png", "lr.png",
        "memory.png", "throughput.png",
    ]  # fmt: skip
    for name in pictures:
        with Image.open(page.with_suffix("") / name) as picture:
            assert picture.width == 1080 and len(picture.convert("L").getcolors(256) or []) > 10


def test_differences_are_found_and_shown(page, runs):
    found = find_differences([read_run(folder, folder.name) for folder in runs])
    assert found["train.lr"] == [1e-3, 3e-3, 5e-4] and found["deepspeed.zero_optimization.stage"] == [1, 2, 1]
    assert "train.run_dir" not in found and "train.seed" not in found
    assert '<td class="key">train.lr</td><td class="same">0.001</td><td class="other">0.003</td>' in page.read_text()


def test_events_stand_on_the_curves(page):
    svg = page.read_text().split('<div class="plot step">')[1].split("</svg>")[0]
    assert svg.count(">R</text>") == 1 and svg.count(">!</text>") == 1


def test_runs_and_dashes_differ_without_colour(page):
    svg = page.read_text().split('<div class="plot step">')[1].split("</svg>")[0]
    assert len(set(re.findall(r"stroke-dasharray: ([0-9., ]+)", svg))) >= 3


def test_a_long_run_is_thinned_to_exact_values(tmp_path, monkeypatch):
    monkeypatch.setattr(report_data, "MOST_POINTS", 10)
    lines = [json.dumps({"step": i, "loss": float(i), "step_seconds": 1.0, "tokens_seen": i}) for i in range(1, 37)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 37, "los')
    found = read_run(tmp_path, "long")
    assert found.every == 4 and found.curves["loss"]["step"] == [1, 5, 9, 13, 17, 21, 25, 29, 33, 36]
    assert found.curves["loss"]["value"] == [float(step) for step in found.curves["loss"]["step"]]
    assert found.curves["loss"]["hours"][-1] == pytest.approx(36 / 3600)


def test_figures_that_are_no_numbers_are_left_out(tmp_path):
    records = [{"step": 1, "loss": "nan", "grad_norm": None}, {"step": 2, "loss": 2.0, "grad_norm": "inf"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = read_run(tmp_path, "bad")
    assert found.curves["loss"]["step"] == [2] and "grad_norm" not in found.curves
    assert report.main([str(tmp_path), "--output", str(tmp_path / "r.html"), "--no-png"]) == 0
    assert not (tmp_path / "r").exists()


def test_runs_of_one_name_are_told_apart_and_mistakes_are_one_line(tmp_path):
    assert name_runs([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == ["a/run", "b/run"]
    for folders, words in (
        ([], "no run given"),
        ([tmp_path], "no step in metrics.jsonl"),
        ([tmp_path] * 7, "at most 6"),
    ):
        with pytest.raises(UserError, match=words):
            report.main([*map(str, folders), "--output", str(tmp_path / "x.html")])
    with pytest.raises(UserError, match="given more than once"):
        name_runs([tmp_path, tmp_path])
    assert not (tmp_path / "x.html").exists()


def test_the_running_mean_begins_at_the_first_value():
    assert smooth([5.0] * 100) == pytest.approx([5.0] * 100)
