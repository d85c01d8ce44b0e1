"""Beside the reference trainer on the same text: real tokens a second, and what was learnt for the tokens seen.

python benchmarks/reference.py speed | learning --peer DIR [--text FILE.jsonl]
"""

import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import harness
import torch
import tyro
from harness import ROOT, Claim, core_threads, find_text, has_fast_bf16, make_shards, ratios, read_texts, report, run
from turns import Contestant, our_trainer, rounds_before, started, take_turns, train_command

from minimind.checkpoints.formats.load_model import load_weights
from minimind.config.run_config import preset
from minimind.model import MiniMindForCausalLM
from minimind.training.peak_flops import peak_flops

TARGETS = {340: 4.0, 512: 5.0}
FEWEST_TEXTS = 4000  # a mean over so many is within 2% of the corpus's
OURS = {"ours fp32": ["--precision", "fp32"], "ours bf16": ["--precision", "bf16"]}
OURS["ours bf16 compiled"] = [*OURS["ours bf16"], "--compile", "on"]
OURS_WITHOUT_BF16 = {"ours fp32": OURS["ours fp32"], "ours fp32 compiled": [*OURS["ours fp32"], "--compile", "on"]}
HELD_OUT = 400  # texts
HIDDEN_SIZE, LAYERS = 256, 4
# The reference's weights start as torch's layers do: a standard deviation of 1 / sqrt(3 * width), which at the width of
# minimind3 is 0.0208, ours 0.02. Here they are alike too; with 0.02 ours ends at a loss 4% higher.
INITIALIZER_RANGE = round((3 * HIDDEN_SIZE) ** -0.5, 4)


@dataclass(frozen=True)
class Peer:
    """A copy of a checkout of the reference trainer, ready to run."""

    folder: Path
    pattern = r"Epoch:\[1/1\]\((?P<step>\d+)/\d+\)"  # the line that it prints after each micro-batch

    @classmethod
    def copied(cls, checkout: Path, folder: Path) -> "Peer":
        """Copy what its trainer needs. Exits with one line when `checkout` is no checkout of it."""
        if not (checkout / "trainer" / "train_pretrain.py").is_file():
            raise SystemExit(
                f"--peer {checkout}: no checkout of jingyaogong/minimind (trainer/train_pretrain.py missing)"
            )
        for part in ("model", "trainer", "dataset"):
            shutil.copytree(checkout / part, folder / part)
        return cls(folder)

    @property
    def tokenizer(self) -> Path:
        """Its tokenizer, for our shards of the same text."""
        return self.folder / "model" / "tokenizer.json"

    def command(self, text: Path, length: int, batch: int, accumulation: int, *more: object) -> list[str]:
        """Its own trainer on `text` (JSONL), on the CPU or the first GPU; start it in `folder / "trainer"`."""
        flags: list[object] = ["--data_path", text, "--max_seq_len", length, "--batch_size", batch, "--epochs", 1]
        flags += ["--accumulation_steps", accumulation, "--log_interval", 1, "--num_workers", 1]
        flags += ["--save_dir", self.folder / "out", "--save_interval", 10**9, *more]
        return [sys.executable, "train_pretrain.py", *map(str, flags)]

    def read_tokens(self, texts: Sequence[str], length: int) -> list[list[int]]:
        """Each text as its dataset gives it to the model, without the padding."""
        from transformers import AutoTokenizer

        if not texts:  # transformers' tokenizer takes no empty batch
            return []
        tokenizer = AutoTokenizer.from_pretrained(self.folder / "model")
        encoded = tokenizer(list(texts), add_special_tokens=False, max_length=length - 2, truncation=True).input_ids
        return [[tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id] for tokens in encoded]


def speed(
    peer: Path, text: Path | None = None, lengths: tuple[int, ...] = (340, 512), rounds: int = 3,
    minutes: float = math.inf, batch: int = 8, accumulation: int = 2, steps: int = 2, model: str = "minimind3",
    programs: tuple[str, ...] | None = None,
) -> None:  # fmt: skip
    """Real tokens a second.

    Args:
        batch: sequences in a micro-batch, for all.
        accumulation: micro-batches in an optimizer step of the reference; ours takes half as many, rounded up: about
            as many real tokens, as nothing of it is padding.
        steps: micro-batches of the reference in a turn; ours makes as many optimizer steps.
        model: preset; the peer has the shape of minimind3.
        programs: names of those that take turns, one of ours among them [default: all].
    """
    claims, measured = [], {}
    ours = OURS if has_fast_bf16() else OURS_WITHOUT_BF16
    names = ("minimind", *ours)
    chosen = programs or names
    if not set(chosen) <= set(names) or not set(chosen) & set(ours):
        raise SystemExit(f"--programs {' '.join(chosen)}: choose of {', '.join(names)}, one of ours among them")
    for length in lengths:
        with harness.workspace() as folder:
            reference = Peer.copied(peer, folder / "peer")
            source = find_text(text, folder)
            texts = read_texts(source, max((rounds + 2) * (steps + 3) * batch * 2, FEWEST_TEXTS))
            rows = reference.read_tokens(texts, length)
            shards = make_shards(source, reference.tokenizer, folder / "shards")
            threads = core_threads()
            command = reference.command(harness.write_texts(folder / "texts.jsonl", texts), length, batch, accumulation)
            env = {**threads, "HF_HOME": str(folder / "hf")}
            contestants = [Contestant("minimind", command, Peer.pattern, steps, reference.folder / "trainer", env)]
            accumulated = -(-accumulation // 2)
            flags = ["--model", model, "--shards", shards, "--seq-len", length, "--micro-batch-size", batch]
            flags += ["--gradient-accumulation-steps", accumulated, "--no-tensorboard"]
            for name, more in ours.items():
                contestants.append(our_trainer(name, folder / name.replace(" ", "-"), [*flags, *more], steps, threads))
            contestants = [contestant for contestant in contestants if contestant.name in chosen]
            print(f"length {length}", file=sys.stderr)
            with started(contestants) as began:
                take_turns(contestants, rounds, began + 60 * minutes / len(lengths))
        kept = sum(map(len, rows))
        tokens = {"minimind": batch * kept / len(rows), **dict.fromkeys(ours, accumulated * batch * length)}
        speeds = {one.name: [tokens[one.name] / seconds for seconds in one.seconds] for one in contestants}
        claims += judge(length, speeds, model)
        per_cpu_second = {one.name: [tokens[one.name] / seconds for seconds in one.cpu_seconds] for one in contestants}
        measured[str(length)] = {"text": str(source), "padding_share": 1 - kept / (len(rows) * length)}
        measured[str(length)] |= {"tokens_per_second": speeds, "tokens_per_cpu_second": per_cpu_second}
    report("train", claims, measured)


def judge(length: int, speeds: dict[str, list[float]], model: str) -> list[Claim]:
    """The lines of the table for one length."""
    title = f"training at {length}"
    claims = [Claim(f"{title}: {name}", values, unit="real tokens/s") for name, values in speeds.items()]
    best = max([name for name in speeds if name.startswith("ours")], key=lambda name: sum(speeds[name]))
    dtype = torch.bfloat16 if "bf16" in best else torch.float32
    if "minimind" in speeds:
        shares = ratios(speeds[best], speeds["minimind"])
        claims.append(Claim(f"{title}: {best} over minimind", shares, TARGETS.get(length), unit="x"))
    peak, source = peak_flops(torch.device("cuda" if torch.cuda.is_available() else "cpu"), dtype)
    shares = [speed * preset(model).flops_per_token(length) / peak for speed in speeds[best]]
    note = f"of the peak of {peak / 1e9:,.0f} GFLOP/s, {source}"
    return [*claims, Claim(f"{title}: MFU of {best}", shares, note=note)]


class Recipe(NamedTuple):
    """How both are trained."""

    peer: Path
    length: int
    batch: int
    lr: float


def learning(
    peer: Path, text: Path | None = None, tokens: int = 250_000, length: int = 340, batch: int = 4,
    lr: float = 1e-3, repeats: int = 4, minutes: float = math.inf,
) -> None:  # fmt: skip
    """Evaluation loss for the tokens seen.

    Args:
        batch: texts in the reference's optimizer step; ours takes about as many real tokens.
        repeats: each with other texts; one alone says little.
    """
    recipe = Recipe(peer, length, batch, lr)
    at_once = 1 if torch.cuda.is_available() else min(len(os.sched_getaffinity(0)), repeats)
    losses: list[tuple[float, float]] = []
    with harness.workspace() as folder, ThreadPoolExecutor(at_once) as pool:
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
    report("learning", claims, {"minimind": theirs, "ours": ours, "tokens": tokens})


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
    file = harness.write_texts(folder / "texts.jsonl", rest[:count])
    del rest[:count]
    return Part(file, count, seen)


def train_both(part: Part, recipe: Recipe, scored: Sequence[Sequence[int]]) -> tuple[float, float]:
    """The losses of the reference and of ours after the same texts."""
    folder = part.file.parent
    env = {"HF_HOME": str(folder / "hf")} | ({} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"})
    own = Peer.copied(recipe.peer, folder / "peer")
    more = ["--hidden_size", HIDDEN_SIZE, "--num_hidden_layers", LAYERS, "--learning_rate", recipe.lr]
    run(own.command(part.file, recipe.length, recipe.batch, 1, *more), own.folder / "trainer", **env)
    trained = load_weights(own.folder / "out" / f"pretrain_{HIDDEN_SIZE}.pth", dtype=torch.float32)
    theirs = score(trained, scored, start=[1])
    ours = score(train_ours(part, own.tokenizer, recipe, env), scored, start=[])
    print(f"  {folder.name}: {theirs:.3f}, ours {ours:.3f}", file=sys.stderr, flush=True)
    return theirs, ours


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
    tyro.extras.subcommand_cli_from_dict({"speed": speed, "learning": learning})
