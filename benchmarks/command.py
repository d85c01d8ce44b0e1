"""The command from outside: time to the first step of `tiny`, and two ranks with one core each beside one (ZeRO-1).

python benchmarks/command.py start | scaling [--precision bf16]
"""

import math
import sys
import time
from pathlib import Path
from typing import Literal

import harness
import tyro
from harness import ROOT, Claim, find_text, make_shards, make_tokenizer, ratios, read_texts, report, workspace
from turns import our_trainer, started, take_turns


def start(repeats: int = 3) -> None:
    """Measure `repeats` starts; one more before them warms the caches of the disk."""
    with workspace() as folder:
        (text := folder / "text.txt").write_text((ROOT / "README.md").read_text() * 4)
        shards = make_shards(text, make_tokenizer(text, folder / "tokenizer", 2000), folder / "shards")
        flags, starts = ["--model", "tiny", "--shards", shards, "--seq-len", 64, "--save-every", 0], []
        for number in range(repeats + 1):
            with started([our_trainer("tiny", folder / f"run{number}", flags, 1, {})], warm_steps=1) as began:
                starts.append(time.perf_counter() - began)
    claims = [Claim("start of tiny to its first step", starts[1:], 20.0, at_least=False, unit="s")]
    report("start", claims, {"first_step_seconds": starts[1:]})


def scaling(
    precision: Literal["fp32", "bf16"] = "bf16", model: str = "minimind3", micro_batch_size: int = 4,
    accumulation: int = 4, seq_len: int = 512, rounds: int = 3, minutes: float = math.inf, steps: int = 2,
    ranks: int = 2, text: Path | None = None,
) -> None:  # fmt: skip
    """Measure ranks, each with `accumulation` micro-batches in an optimizer step, beside one that is alone."""
    with workspace() as folder:
        source = harness.write_texts(folder / "part.jsonl", read_texts(find_text(text, folder), 20_000))
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
    report("weak_scaling", claims, {"seconds_a_step": {"1": alone, str(ranks): together}, "tokens": tokens})


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"start": start, "scaling": scaling})
