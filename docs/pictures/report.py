"""The README's picture of a report: python docs/pictures/report.py; needs chromium.

Two of the runs behind curves.json, put back into run folders, and the charts of the page that `minimind.report` makes
of them: a part of it, because the curves do not hold the times.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NAMES = {"healthy": 3e-3, "overfitting": 1e-2}
CHARTS = slice(295, 640)
"""The rows of the page that are shown."""


def put_back(name: str, run: dict, lr: float, folder: Path) -> Path:
    """A run folder with what the report reads: the settings of make.py's run, and its metrics."""
    folder = folder / name
    folder.mkdir()
    data, train = {"seq_len": 128}, {"lr": lr, "steps": 120, "micro_batch_size": 8, "optimizer": "adamw"}
    settings = {"model": {"preset": "tiny", "vocab_size": 2000}, "data": data, "train": train}
    (folder / "run_config.json").write_text(json.dumps(settings), encoding="utf-8")
    lines: list[dict] = []
    for step, tokens, loss, norm in zip(
        *(run[key] for key in ("step", "tokens_seen", "loss", "grad_norm")), strict=True
    ):
        lines.append({"step": step, "tokens_seen": tokens, "loss": loss, "grad_norm": norm})
        lines += [{"step": step, "eval_loss": value} for place, value in run["eval"] if place == step]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def main() -> None:
    curves = json.loads((HERE / "curves.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as work:
        folders = [str(put_back(name, curves[name], lr, Path(work))) for name, lr in NAMES.items()]
        page = Path(work) / "report.html"
        command = [sys.executable, "-m", "minimind.report", *folders, "--output", str(page)]
        subprocess.run(command, cwd=ROOT, check=True)
        browser = shutil.which("chromium") or shutil.which("google-chrome")
        assert browser, "no chromium"
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,900")
        whole = Path(work) / "whole.png"
        subprocess.run([browser, *flags, f"--screenshot={whole}", page.as_uri()], check=True)
        plt.imsave(HERE / "report.png", plt.imread(whole)[CHARTS], metadata={"Software": None})


if __name__ == "__main__":
    main()
