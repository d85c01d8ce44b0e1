"""Trains the runs behind the documentation's pictures and draws them: python docs/pictures/make.py [--draw-only]

Runs of the real training command on the default corpus; their figures go to runs.json, their curves to curves.json, and
the pictures are drawn from those two files. A few minutes on two cores. Knows nothing of the pages.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WORK = ROOT / "data" / "pictures"
RUNS = ROOT / "runs" / "pictures"

SEQ_LEN = 128
# name: (learning rate, sequences a step, steps, corpus, further flags)
LEARNING_RATES = {
    "lr-1e-4": (1e-4, 8, 120, "large", ()),
    "lr-1e-3": (1e-3, 8, 120, "large", ()),
    "lr-3e-3": (3e-3, 8, 120, "large", ()),
    "lr-1e-2": (1e-2, 8, 120, "large", ()),
}
BATCHES = {"batch-4": (3e-3, 4, 240, "large", ()), "batch-16": (3e-3, 16, 60, "large", ())}
SICK = {
    # The rate rises for most of the run, far beyond what the model can bear.
    "too-high": (0.5, 8, 120, "large", ("--max-grad-norm", "0", "--warmup-steps", "110", "--no-qk-norm")),
    "overfitting": (1e-2, 8, 120, "small", ("--eval-every", "20")),
    "healthy": (3e-3, 8, 120, "large", ("--eval-every", "20")),
}


def run(*arguments: str) -> None:
    """One command of the project, in the repository."""
    subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, check=True)


def prepare() -> None:
    """Two corpora: three megabytes, and a three-hundredth of it for overfitting. Both are evaluated on the large one's
    validation split: the split is a function of a document's text, so none of it is in the small one's training."""
    corpus, tokenizer = WORK / "corpus.jsonl", WORK / "tokenizer"
    if not corpus.exists():
        run("data_prep.default_corpus", "--output", str(corpus), "--max-bytes", "3000000")
        run("data_prep.train_tokenizer", "--input", str(corpus), "--output", str(tokenizer), "--vocab-size", "2000")
    small = WORK / "small.jsonl"
    lines = corpus.read_text(encoding="utf-8").splitlines(keepends=True)
    small.write_text("".join(lines[::300]), encoding="utf-8")
    for name, source in (("large", corpus), ("small", small)):
        if not (WORK / name / "train").exists():
            shards = ("--tokenizer", str(tokenizer), "--output", str(WORK / name), "--val-fraction", "0.1")
            run("data_prep.tokenize_corpus", "--input", str(source), *shards)
    shutil.rmtree(WORK / "small" / "val", ignore_errors=True)
    shutil.copytree(WORK / "large" / "val", WORK / "small" / "val")


def train(name: str, lr: float, sequences: int, steps: int, corpus: str, flags: tuple[str, ...]) -> None:
    """One run of `tiny`; a run that is stopped by NaN is a result too."""
    command = ["--model", "tiny", "--vocab-size", "2000", "--shards", str(WORK / corpus), "--run-dir", str(RUNS / name)]
    command += ["--seq-len", str(SEQ_LEN), "--micro-batch-size", str(min(sequences, 8)), "--steps", str(steps)]
    command += [
        "--global-batch-size",
        str(sequences),
        "--optimizer",
        "adamw",
        "--lr",
        str(lr),
        "--eval-samples",
        "32",
        "--no-tensorboard",
        *flags,
    ]
    subprocess.run([sys.executable, "-m", "minimind.train", *command], cwd=ROOT, check=name != "too-high")


def read_run(name: str, lr: float, sequences: int) -> tuple[dict, dict]:
    """A run's figures for the table, and its curves."""
    records = [json.loads(line) for line in (RUNS / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if "loss" in record]
    evaluations = [(record["step"], record["eval_loss"]) for record in records if "eval_loss" in record]
    window = [record["loss"] for record in steps[-10:]]
    finite = all(isinstance(value, float) for value in window)
    figures = {
        "lr": lr,
        "sequences": sequences,
        "tokens": steps[-1]["tokens_seen"],
        "last_loss": sum(window) / len(window) if finite else "NaN",
        "eval_loss": evaluations[-1][1] if evaluations else None,
    }
    keys = ("step", "tokens_seen", "loss", "grad_norm")
    curves = {key: [record[key] for record in steps] for key in keys}
    return figures, {**curves, "eval": evaluations}


def main() -> None:
    everything = {**LEARNING_RATES, **BATCHES, **SICK}
    if "--draw-only" not in sys.argv:
        prepare()
        figures, curves = {}, {}
        for name, settings in everything.items():
            if not (RUNS / name / "metrics.jsonl").exists():
                train(name, *settings)
            figures[name], curves[name] = read_run(name, settings[0], settings[1])
        table = {name: figures[name] for name in (*LEARNING_RATES, *BATCHES)}
        (HERE / "runs.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        (HERE / "curves.json").write_text(json.dumps(curves) + "\n", encoding="utf-8")
    draw(json.loads((HERE / "curves.json").read_text(encoding="utf-8")))
    draw_time_to_loss()


def draw(curves: dict) -> None:
    """Both pictures. Words are few and technical, so that they serve both languages; lines differ without colour."""
    plt.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "minimind", "font.size": 9})
    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3})
    figure, axis = plt.subplots(figsize=(6.5, 3.6), constrained_layout=True)
    for name, style in zip(LEARNING_RATES, (":", "--", "-", "-."), strict=True):
        run_curves = curves[name]
        axis.plot(run_curves["tokens_seen"], smooth(run_curves["loss"]), style, label=name.replace("lr-", "lr = "))
    axis.set(xlabel="tokens", ylabel="loss")
    axis.legend()
    save(figure, "learning_rates.svg")

    figure, axes = plt.subplots(2, 3, figsize=(9, 4.6), sharex="col", constrained_layout=True)
    for column, name in enumerate(("healthy", "too-high", "overfitting")):
        run_curves = curves[name]
        loss = [value if isinstance(value, float) else float("nan") for value in run_curves["loss"]]
        norm = [value if isinstance(value, float) else float("nan") for value in run_curves["grad_norm"]]
        axes[0, column].plot(run_curves["step"], loss, "-", linewidth=0.9, label="loss")
        if run_curves["eval"]:
            axes[0, column].plot(*zip(*run_curves["eval"], strict=True), "o--", markersize=3, label="eval_loss")
        axes[0, column].set_title(name)
        axes[0, column].legend()
        axes[1, column].plot(run_curves["step"], norm, "-", linewidth=0.9)
        axes[1, column].set(xlabel="step", yscale="log")
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("grad_norm")
    save(figure, "healthy_and_sick.svg")


def draw_time_to_loss() -> None:
    """Held-out loss over seconds and over tokens, from the JSON of `benchmarks/reference.py time-to-loss`, which is
    brought here: a row for each batch of the reference, in texts."""
    figure, rows = plt.subplots(2, 2, figsize=(7.5, 5.6), sharey="row", constrained_layout=True)
    for batch, axes in zip((256, 8), rows, strict=True):
        runs = json.loads((HERE / f"time_to_loss_{batch}.json").read_text(encoding="utf-8"))["measured"]["curves"]
        for (name, curves), style in zip(runs.items(), ("k.--", "C0.-"), strict=True):
            for number, points in enumerate(curves):
                seconds, tokens, bits = zip(*points, strict=True)
                for axis, values in zip(axes, (seconds, tokens), strict=True):
                    axis.plot(values, bits, style, label=None if number else name)
        axes[0].set(xlabel="seconds", ylabel="bits a byte", xscale="log", title=f"minimind: {batch} texts a step")
        axes[1].set(xlabel="tokens", xscale="log")
        for axis in axes:
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.xaxis.set_minor_formatter(NullFormatter())
    rows[0, 0].legend()
    save(figure, "time_to_loss.svg")


def smooth(values: list[float], decay: float = 0.9) -> list[float]:
    """A running mean that forgets, corrected at its start."""
    mean, smoothed = 0.0, []
    for count, value in enumerate(values, start=1):
        mean = decay * mean + (1 - decay) * value
        smoothed.append(mean / (1 - decay**count))
    return smoothed


def save(figure: plt.Figure, name: str) -> None:
    """An SVG that is the same for the same data."""
    figure.savefig(HERE / name, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
