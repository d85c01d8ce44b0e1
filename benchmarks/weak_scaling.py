"""Weak scaling on one machine: two ranks with one core each beside one rank with one core, under ZeRO-1.

python benchmarks/weak_scaling.py [--precision bf16]
"""

import math
import sys
from pathlib import Path
from typing import Literal

import tyro
from harness import Claim, find_text, make_shards, make_tokenizer, ratios, read_texts, report, workspace, write_texts
from turns import our_trainer, started, take_turns


def main(
    precision: Literal["fp32", "bf16"] = "bf16", model: str = "minimind3", micro_batch_size: int = 4,
    accumulation: int = 4, seq_len: int = 512, rounds: int = 3, minutes: float = math.inf, steps: int = 2,
    ranks: int = 2, text: Path | None = None,
) -> None:  # fmt: skip
    """Measure.

    Args:
        accumulation: micro-batches a rank in an optimizer step.
    """
    with workspace() as folder:
        source = write_texts(folder / "part.jsonl", read_texts(find_text(text, folder), 20_000))
        shards = make_shards(source, make_tokenizer(source, folder / "tokenizer"), folder / "shards")
        flags = ["--model", model, "--shards", shards, "--seq-len", seq_len, "--micro-batch-size", micro_batch_size]
        flags += ["--gradient-accumulation-steps", accumulation, "--precision", precision, "--no-tensorboard"]
        contestants = []
        for world in (1, ranks):
            launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}")
            run_dir, env = folder / f"run{world}", {"OMP_NUM_THREADS": "1"}
            contestants.append(our_trainer(f"{world} ranks", run_dir, flags, steps, env, launcher))
        with started(contestants) as began:
            take_turns(contestants, rounds, began + 60 * minutes)
    alone, together = (contestant.seconds for contestant in contestants)
    title = f"weak scaling, {precision}, ZeRO-1: {ranks} ranks over {ranks} times one"
    # Twice the work in the same time would be a ratio of 1.
    claims = [Claim(title, ratios(alone, together), 0.9, unit="x")]
    tokens = micro_batch_size * accumulation * seq_len
    report(__file__, claims, {"seconds_a_step": {"1": alone, str(ranks): together}, "tokens": tokens})


if __name__ == "__main__":
    tyro.cli(main)
