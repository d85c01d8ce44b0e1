"""How long until something happens: from the command to the first step of `tiny`, and what the imports cost.

python benchmarks/start.py
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro
from measure import ROOT, Claim, environment, report
from texts import make_shards, run_module

IMPORTS = (
    "torch",
    "deepspeed",
    "minimind.model",
    "minimind.data.loader",
    "minimind.train",
    "data_prep.tokenize_corpus",
)


def main(repeats: int = 3, output: Path | None = None) -> None:
    """Measure.

    Args:
        repeats: starts of each kind; one more before them warms the caches of the disk.
        output: where the JSON goes.
    """
    where = environment()
    with tempfile.TemporaryDirectory(prefix="start-benchmark-") as name:
        shards = make_tiny_shards(Path(name))
        starts = [time_first_step(shards, Path(name) / f"run{number}") for number in range(repeats + 1)][1:]
    seconds = {module: [time_import(module) for _ in range(repeats)] for module in IMPORTS}
    claims = [Claim("start of tiny to its first step", tuple(starts), 20.0, at_least=False, unit="s")]
    claims += [Claim(f"import {module}", tuple(values), unit="s") for module, values in seconds.items()]
    report(__file__, where, claims, {"first_step_seconds": starts, "import_seconds": seconds}, output)


def make_tiny_shards(folder: Path) -> Path:
    """Shards of this repository's README."""
    text, tokenizer = folder / "text.txt", folder / "tokenizer"
    text.write_text((ROOT / "README.md").read_text() * 4)
    run_module("data_prep.train_tokenizer", "--input", text, "--output", tokenizer, "--vocab-size", 2000)
    return make_shards(text, tokenizer, folder / "shards")


def time_first_step(shards: Path, run_dir: Path) -> float:
    """Seconds from the command until the first step stands in metrics.jsonl."""
    command = [sys.executable, "-m", "minimind.train", "--model", "tiny", "--shards", shards, "--run-dir", run_dir]
    command += ["--seq-len", "64", "--steps", "100000", "--save-every", "0"]
    log = run_dir / "metrics.jsonl"
    began = time.perf_counter()
    process = subprocess.Popen(
        [str(part) for part in command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        while not (log.exists() and log.stat().st_size):
            if process.poll() is not None:
                raise SystemExit(f"it ended without a step:\n{process.communicate()[0].decode()[-800:]}")
            time.sleep(0.01)
        return time.perf_counter() - began
    finally:
        process.kill()
        process.communicate()


def time_import(module: str) -> float:
    """Seconds of one import in a fresh interpreter, the interpreter's own start taken off."""
    seconds = []
    for code in ("pass", f"import {module}"):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
        seconds.append(time.perf_counter() - began)
    return seconds[1] - seconds[0]


if __name__ == "__main__":
    tyro.cli(main)
