"""What was learnt for the tokens seen: the reference trainer and ours on the same text, evaluated in the same way.

python benchmarks/learning.py --peer DIR [--text FILE.jsonl] [--tokens 250000]
"""

import math
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from harness import ROOT, Claim, find_text, make_shards, ratios, read_texts, report, run, workspace, write_texts
from turns import Peer, rounds_before, train_command

from minimind.checkpoints.formats.load_model import load_weights
from minimind.model import MiniMindForCausalLM

HELD_OUT = 400  # texts
HIDDEN_SIZE, LAYERS = 256, 4
# The reference's weights start as torch's layers do: a standard deviation of 1 / sqrt(3 * width), which at the width of
# minimind3 is 0.0208, ours 0.02. Here they are alike too; with 0.02 ours ends at a loss 4% higher.
INITIALIZER_RANGE = round((3 * HIDDEN_SIZE) ** -0.5, 4)


class Recipe(NamedTuple):
    """How both are trained."""

    peer: Path
    length: int
    batch: int
    lr: float


def main(
    peer: Path, text: Path | None = None, tokens: int = 250_000, length: int = 340, batch: int = 4,
    lr: float = 1e-3, repeats: int = 4, minutes: float = math.inf,
) -> None:  # fmt: skip
    """Measure.

    Args:
        batch: texts in the reference's optimizer step; ours takes about as many real tokens.
        repeats: each with other texts; one alone says little.
    """
    recipe = Recipe(peer, length, batch, lr)
    at_once = 1 if torch.cuda.is_available() else min(len(os.sched_getaffinity(0)), repeats)
    losses: list[tuple[float, float]] = []
    with workspace() as folder, ThreadPoolExecutor(at_once) as pool:
        reference = Peer.copied(peer, folder / "peer")
        texts = read_texts(find_text(text, folder))
        held_out, rest = texts[:HELD_OUT], texts[HELD_OUT:]
        scored = [row[1:-1] for row in reference.read_tokens(held_out, length)]
        for _ in rounds_before(time.perf_counter() + 60 * minutes, -(-repeats // at_once)):
            numbers = range(len(losses), min(repeats, len(losses) + at_once))
            found = [take_texts(reference, rest, tokens, length, folder / f"repeat {n + 1}") for n in numbers]
            losses += pool.map(lambda part: train_both(part, recipe, scored), filter(None, found))
            if not losses:
                raise SystemExit(f"the text has fewer than {tokens:,} tokens: give more --text or fewer --tokens")
            if None in found:
                print(f"  the text is used up after {len(losses)} of {repeats} repeats", file=sys.stderr)
                break
    theirs, ours = zip(*losses, strict=True)
    title = f"evaluation loss after {tokens:,} tokens"
    claims = [Claim(f"{title}: {name}", found, unit="nats") for name, found in (("minimind", theirs), ("ours", ours))]
    claims.append(Claim(f"{title}: ours over minimind", ratios(ours, theirs), 1.0, at_least=False, unit="x"))
    report(__file__, claims, {"minimind": theirs, "ours": ours, "tokens": tokens})


class Part(NamedTuple):
    """Texts of one repeat; `tokens` as the reference reads them: with its marks, and cut at its maximum length."""

    file: Path
    texts: int
    tokens: int


def take_texts(reference: Peer, rest: list[str], tokens: int, length: int, folder: Path) -> Part | None:
    """Take the first of `rest` away until they have `tokens`. None where there are too few."""
    count = seen = 0
    for row in reference.read_tokens(rest[: tokens // 20], length):
        if seen >= tokens:
            break
        count, seen = count + 1, seen + len(row)
    if seen < tokens:
        return None
    folder.mkdir()
    file = write_texts(folder / "texts.jsonl", rest[:count])
    del rest[:count]
    return Part(file, count, seen)


def train_both(part: Part, recipe: Recipe, scored: Sequence[Sequence[int]]) -> tuple[float, float]:
    """The losses of the reference and of ours after the same texts."""
    folder = part.file.parent
    env = {"HF_HOME": str(folder / "hf")} | ({} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"})
    own = Peer.copied(recipe.peer, folder / "peer")
    theirs = score(train_reference(own, part.file, recipe, env), scored, start=[1])
    ours = score(train_ours(part, own.tokenizer, recipe, env), scored, start=[])
    print(f"  {folder.name}: {theirs:.3f}, ours {ours:.3f}", file=sys.stderr, flush=True)
    return theirs, ours


def train_reference(reference: Peer, file: Path, recipe: Recipe, env: dict[str, str]) -> MiniMindForCausalLM:
    """Its own trainer for an epoch; its weights in our model."""
    more = ["--hidden_size", HIDDEN_SIZE, "--num_hidden_layers", LAYERS, "--learning_rate", recipe.lr]
    run(reference.command(file, recipe.length, recipe.batch, 1, *more), reference.folder / "trainer", **env)
    return load_weights(reference.folder / "out" / f"pretrain_{HIDDEN_SIZE}.pth", dtype=torch.float32)


def train_ours(part: Part, tokenizer: Path, recipe: Recipe, env: dict[str, str]) -> MiniMindForCausalLM:
    """As many tokens of the same texts. Ours does not cut them at `length`, so it does not come to the last of them."""
    folder = part.file.parent
    windows = max(1, round(recipe.batch * part.tokens / part.texts / recipe.length))
    steps = max(1, round(part.tokens / (windows * recipe.length)))
    shards = make_shards(part.file, tokenizer, folder / "shards", val_fraction=0)
    flags: list[object] = ["--model", "minimind3", "--hidden-size", HIDDEN_SIZE, "--num-hidden-layers", LAYERS]
    flags += ["--initializer-range", INITIALIZER_RANGE, "--shards", shards, "--seq-len", recipe.length]
    flags += ["--micro-batch-size", windows, "--steps", steps, "--lr", recipe.lr, "--precision", "bf16"]
    run(train_command(folder / "run", "--no-tensorboard", *flags), ROOT, **env)
    return load_weights(folder / "run", dtype=torch.float32)


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
