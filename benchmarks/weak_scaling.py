"""Weak scaling on one machine: two ranks with one core each beside one rank with one core, under ZeRO-1.

    python benchmarks/weak_scaling.py [--precision bf16]

Every rank has the same batch in both. The ratio is the tokens a second of two ranks over twice those of one.
"""

import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import tyro
from measure import ROOT, Claim, environment, ratios, report
from peer import read_texts
from texts import find_text, make_shards, run_module
from train import STEP_IN_LOG
from turns import Contestant, started, take_turns


def main(
    precision: Literal["fp32", "bf16"] = "bf16",
    model: str = "minimind3",
    micro_batch_size: int = 4,
    accumulation: int = 4,
    seq_len: int = 512,
    rounds: int = 3,
    minutes: float = math.inf,
    steps: int = 2,
    ranks: int = 2,
    text: Path | None = None,
    output: Path | None = None,
) -> None:
    """Measure.

    Args:
        precision: of forward and backward.
        model: preset.
        micro_batch_size: sequences a rank in one forward.
        accumulation: micro-batches a rank in an optimizer step.
        seq_len: length of a sequence.
        rounds: turns of each, at most.
        minutes: time for all of it: fewer rounds are made on a slow machine.
        steps: optimizer steps in a turn.
        ranks: ranks of the larger world.
        text: JSONL with a `text` field [default: what `texts.py` finds on this machine].
        output: where the JSON goes.
    """
    where, deadline = environment(), time.perf_counter() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="weak-scaling-") as name:
        folder = Path(name)
        texts = read_texts(find_text(text, folder), 20_000)
        source = folder / "part.jsonl"
        source.write_text("".join(json.dumps({"text": item}) + "\n" for item in texts))
        run_module("data_prep.train_tokenizer", "--input", source, "--output", folder / "tokenizer")
        shards = make_shards(source, folder / "tokenizer", folder / "shards")
        contestants = []
        for world in (1, ranks):
            run_dir = folder / f"run{world}"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
            command += ["-m", "minimind.train", "--model", model, "--shards", str(shards), "--run-dir", str(run_dir)]
            command += ["--seq-len", str(seq_len), "--micro-batch-size", str(micro_batch_size), "--document-mask"]
            command += ["--gradient-accumulation-steps", str(accumulation), "--precision", precision]
            command += ["--steps", "100000", "--no-tensorboard", "--ds-config", str(ROOT / "ds_configs" / "zero1.json")]
            env = {"OMP_NUM_THREADS": "1"}
            log = run_dir / "metrics.jsonl"
            contestants.append(Contestant(f"{world} ranks", command, STEP_IN_LOG, steps, cwd=ROOT, env=env, log=log))
        with started(contestants):
            take_turns(contestants, rounds, deadline)
    alone, together = ([turn.wall_seconds / steps for turn in contestant.turns] for contestant in contestants)
    # Twice the work in the same time would be a ratio of 1.
    shares = ratios(alone, together)
    title = f"weak scaling, {precision}, ZeRO-1: {ranks} ranks over {ranks} times one"
    claims = [Claim(title, shares, 0.9, unit="x")]
    tokens = micro_batch_size * accumulation * seq_len
    report(__file__, where, claims, {"seconds_a_step": {"1": alone, str(ranks): together}, "tokens": tokens}, output)


if __name__ == "__main__":
    tyro.cli(main)
