"""What was learnt for the tokens seen: the reference trainer and ours on the same text, evaluated in the same way.

    python benchmarks/learning.py --peer DIR [--text FILE.jsonl] [--tokens 250000]

Both train on the same texts at the same peak learning rate, for the same number of real tokens and about as many
optimizer steps; the model is minimind3 in a smaller size, so that this takes minutes. Steps are small, for there must
be enough of them: at first all models only learn which tokens are frequent, and stay at that loss for a time that
chance decides (after 121 steps of 2,720 tokens three seeds of ours differed by 5%). Then the weights of both are read
by our model and scored on the same held-out texts: the mean loss of each token after the first, the text alone in its
context, in float32 (the reference's after its own start token, as it was trained). Nothing is timed: on a CPU as many
repeats run side by side as there are cores, each on one thread.
"""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from measure import ROOT, Claim, environment, ratios, report
from peer import Peer, read_texts
from texts import find_text, make_shards

from minimind.checkpoints.formats.load_model import load_model
from minimind.config.run_config import preset
from minimind.model import MiniMindForCausalLM

HELD_OUT = 400  # texts
HIDDEN_SIZE, LAYERS = 256, 4
# The reference's weights start as torch's layers do: a standard deviation of 1 / sqrt(3 * width), which at the width of
# minimind3 is 0.0208, ours 0.02. Here they are alike too; with 0.02 ours ends at a loss 4% higher.
INITIALIZER_RANGE = round((3 * HIDDEN_SIZE) ** -0.5, 4)


def main(
    peer: Path,
    text: Path | None = None,
    tokens: int = 250_000,
    length: int = 340,
    batch: int = 4,
    lr: float = 1e-3,
    repeats: int = 4,
    minutes: float = math.inf,
    output: Path | None = None,
) -> None:
    """Measure.

    Args:
        peer: checkout of jingyaogong/minimind.
        text: JSONL with a `text` field [default: what `texts.py` finds on this machine].
        tokens: real tokens to train on.
        length: the reference's maximum length and our window.
        batch: texts in the reference's optimizer step; ours takes about as many real tokens.
        lr: peak learning rate of both.
        repeats: each with other texts, as far as there are any; one alone says little.
        minutes: time for all of it: fewer repeats are made on a slow machine.
        output: where the JSON goes.
    """
    where, deadline, longest = environment(), time.perf_counter() + 60 * minutes, 0.0
    at_once = 1 if torch.cuda.is_available() else min(len(os.sched_getaffinity(0)), repeats)
    folder = Path(tempfile.mkdtemp(prefix="learning-benchmark-"))
    losses: list[tuple[float, float]] = []
    try:
        reference = Peer.copied(peer, folder / "peer")
        texts = read_texts(find_text(text, folder))
        held_out, rest = texts[:HELD_OUT], texts[HELD_OUT:]
        scored = [row[1:-1] for row in reference.read_tokens(held_out, length)]

        def train_both(taken: Part) -> tuple[float, float]:
            own = Peer.copied(peer, taken.file.parent / "peer")
            theirs = score(train_reference(own, taken.file, length, batch, lr), scored, start=[1])
            windows = max(1, round(batch * taken.tokens / taken.texts / length))
            steps = max(1, round(taken.tokens / (windows * length)))
            ours = score(train_ours(taken.file, own.tokenizer, length, windows, steps, lr), scored, start=[])
            print(f"  {taken.file.parent.name}: {theirs:.3f}, ours {ours:.3f}", file=sys.stderr, flush=True)
            return theirs, ours

        with ThreadPoolExecutor(at_once) as pool:
            while len(losses) < repeats:
                began = time.perf_counter()
                if losses and began + longest > deadline:
                    print(f"  the time is up after {len(losses)} of {repeats} repeats", file=sys.stderr)
                    break
                numbers = range(len(losses), min(repeats, len(losses) + at_once))
                found = [take_texts(reference, rest, tokens, length, folder / f"repeat {n + 1}") for n in numbers]
                parts = [part for part in found if part is not None]
                losses += pool.map(train_both, parts)
                if not losses:
                    raise SystemExit(f"the text has fewer than {tokens:,} tokens: give more --text or fewer --tokens")
                if len(parts) < len(found):
                    print(f"  the text is used up after {len(losses)} of {repeats} repeats", file=sys.stderr)
                    break
                longest = max(longest, time.perf_counter() - began)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    theirs, ours = zip(*losses, strict=True)
    title = f"evaluation loss after {tokens:,} tokens"
    claims = [
        Claim(f"{title}: minimind", theirs, unit="nats a token"),
        Claim(f"{title}: ours", ours, unit="nats a token"),
        Claim(f"{title}: ours over minimind", ratios(ours, theirs), 1.0, at_least=False, unit="x"),
    ]
    report(__file__, where, claims, {"minimind": theirs, "ours": ours, "tokens": tokens}, output)


@dataclass(frozen=True)
class Part:
    """What one repeat trains on."""

    file: Path
    texts: int
    tokens: int
    """As the reference reads them: its start and end marks counted, and nothing beyond its maximum length."""


def take_texts(reference: Peer, rest: list[str], tokens: int, length: int, folder: Path) -> Part | None:
    """Take the first of `rest` away until they have `tokens`. None where there are too few."""
    rows, seen = [], 0
    for row in reference.read_tokens(rest[: tokens // 20], length):
        if seen >= tokens:
            break
        rows.append(row)
        seen += len(row)
    if seen < tokens:
        return None
    folder.mkdir()
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": item}, ensure_ascii=False) + "\n" for item in rest[: len(rows)]))
    del rest[: len(rows)]
    return Part(file, len(rows), seen)


def run(command: Sequence[object], folder: Path) -> None:
    """Run one trainer to its end."""
    env = {**os.environ, "HF_HOME": str(folder / "hf")}
    if not torch.cuda.is_available():
        env["OMP_NUM_THREADS"] = "1"
    done = subprocess.run([str(part) for part in command], cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{(done.stderr or done.stdout).strip()[-800:]}")


def train_reference(reference: Peer, part: Path, length: int, batch: int, lr: float) -> MiniMindForCausalLM:
    """One epoch of its own trainer; its weights in our model."""
    more = ["--hidden_size", HIDDEN_SIZE, "--num_hidden_layers", LAYERS, "--learning_rate", lr]
    run(reference.command(part, length=length, batch=batch, accumulation=1, more=more), reference.folder / "trainer")
    state = torch.load(reference.folder / "out" / f"pretrain_{HIDDEN_SIZE}.pth", weights_only=True)
    model = small_model()
    missing, unexpected = model.load_state_dict({name: value.float() for name, value in state.items()}, strict=False)
    if missing or any("freqs" not in name for name in unexpected):
        raise SystemExit(f"the reference's weights do not fit: missing {missing}, unexpected {unexpected}")
    return model.eval()


def train_ours(part: Path, tokenizer: Path, length: int, windows: int, steps: int, lr: float) -> MiniMindForCausalLM:
    """As many tokens of the same texts. Ours does not cut them at `length`, so it does not come to the last of them."""
    folder = part.parent
    shards = make_shards(part, tokenizer, folder / "shards", val_fraction=0)
    command: list[object] = [sys.executable, "-m", "minimind.train", "--model", "minimind3"]
    command += ["--hidden-size", HIDDEN_SIZE, "--num-hidden-layers", LAYERS, "--shards", shards, "--seq-len", length]
    command += ["--initializer-range", INITIALIZER_RANGE]
    command += ["--document-mask", "--micro-batch-size", windows, "--steps", steps, "--lr", lr, "--precision", "bf16"]
    command += ["--run-dir", folder / "run", "--no-tensorboard", "--ds-config", ROOT / "ds_configs" / "zero1.json"]
    run(command, ROOT)
    model, *_ = load_model(folder / "run", dtype=torch.float32)
    return model


def small_model() -> MiniMindForCausalLM:
    """minimind3, smaller."""
    config = dataclasses.replace(preset("minimind3"), hidden_size=HIDDEN_SIZE, num_hidden_layers=LAYERS)
    return MiniMindForCausalLM(config)


@torch.no_grad()
def score(model: MiniMindForCausalLM, rows: Sequence[Sequence[int]], start: Sequence[int]) -> float:
    """Mean loss of every token but the first of each row, read after the tokens in `start`."""
    total, count = 0.0, 0
    for row in rows:
        if len(row) < 2:
            continue
        tokens = torch.tensor([[*start, *row]])
        labels = tokens[:, 1:].clone()
        labels[:, : len(start)] = -100
        total += float(model(tokens[:, :-1], labels, loss_reduction="sum").loss)
        count += len(row) - 1
    return total / count


if __name__ == "__main__":
    tyro.cli(main)
