"""Time until something happens: from the command to the first step of `tiny`, and what the imports cost.

python benchmarks/start.py
"""

import sys
import time
from pathlib import Path

import tyro
from harness import ROOT, Claim, make_shards, make_tokenizer, report, run, workspace
from turns import our_trainer

IMPORTS = (
    "torch",
    "deepspeed",
    "minimind.model",
    "minimind.data.loader",
    "minimind.train",
    "data_prep.tokenize_corpus",
)


def main(repeats: int = 3) -> None:
    """Measure `repeats` starts of each kind; one more before them warms the caches of the disk."""
    with workspace() as folder:
        text = folder / "text.txt"
        text.write_text((ROOT / "README.md").read_text() * 4)
        shards = make_shards(text, make_tokenizer(text, folder / "tokenizer", 2000), folder / "shards")
        starts = [time_first_step(shards, folder / f"run{number}") for number in range(repeats + 1)][1:]
    seconds = {module: [time_import(module) for _ in range(repeats)] for module in IMPORTS}
    claims = [Claim("start of tiny to its first step", starts, 20.0, at_least=False, unit="s")]
    claims += [Claim(f"import {module}", values, unit="s") for module, values in seconds.items()]
    report(__file__, claims, {"first_step_seconds": starts, "import_seconds": seconds})


def time_first_step(shards: Path, run_dir: Path) -> float:
    """Seconds from the command until metrics.jsonl holds the first step."""
    flags = ["--model", "tiny", "--shards", shards, "--seq-len", 64, "--save-every", 0]
    trainer, began = our_trainer("tiny", run_dir, flags, 1, {}), time.perf_counter()
    try:
        trainer.start()
        return trainer.wait_steps(1)[0] - began
    finally:
        trainer.end()


def time_import(module: str) -> float:
    """Seconds of one import in a fresh interpreter, without the interpreter's own start."""
    moments = [time.perf_counter()]
    for code in ("pass", f"import {module}"):
        run([sys.executable, "-c", code], ROOT)
        moments.append(time.perf_counter())
    return (moments[2] - moments[1]) - (moments[1] - moments[0])


if __name__ == "__main__":
    tyro.cli(main)
