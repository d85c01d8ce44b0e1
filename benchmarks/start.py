"""Time until something happens: from the command to the first step of `tiny`.

python benchmarks/start.py
"""

import time
from pathlib import Path

import tyro
from harness import ROOT, Claim, make_shards, make_tokenizer, report, workspace
from turns import our_trainer


def main(repeats: int = 3) -> None:
    """Measure `repeats` starts; one more before them warms the caches of the disk."""
    with workspace() as folder:
        text = folder / "text.txt"
        text.write_text((ROOT / "README.md").read_text() * 4)
        shards = make_shards(text, make_tokenizer(text, folder / "tokenizer", 2000), folder / "shards")
        starts = [time_first_step(shards, folder / f"run{number}") for number in range(repeats + 1)][1:]
    claims = [Claim("start of tiny to its first step", starts, 20.0, at_least=False, unit="s")]
    report(__file__, claims, {"first_step_seconds": starts})


def time_first_step(shards: Path, run_dir: Path) -> float:
    """Seconds from the command until metrics.jsonl holds the first step."""
    flags = ["--model", "tiny", "--shards", shards, "--seq-len", 64, "--save-every", 0]
    trainer, began = our_trainer("tiny", run_dir, flags, 1, {}), time.perf_counter()
    try:
        trainer.start()
        return trainer.wait_steps(1)[0] - began
    finally:
        trainer.end()


if __name__ == "__main__":
    tyro.cli(main)
