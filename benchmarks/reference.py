"""Beside the reference trainer on the same text: real tokens a second, and how long until the loss is as good.

python benchmarks/reference.py speed | time-to-loss --peer DIR [--text FILE.jsonl]
"""

import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import harness
import torch
import tyro
from harness import ROOT, Claim, core_threads, find_text, has_fast_bf16, make_shards, ratios, read_texts, report, run
from turns import Contestant, our_trainer, started, take_turns

from minimind.accelerator import default_device
from minimind.checkpoints.formats.load_model import load_weights
from minimind.config.run_config import preset
from minimind.model import MiniMindForCausalLM
from minimind.training.peak_flops import peak_flops

TARGETS = {340: 4.0, 512: 5.0}
FEWEST_TEXTS = 4000  # a mean over so many is within 2% of the corpus's
OURS = {"ours fp32": ["--precision", "fp32"], "ours bf16": ["--precision", "bf16"]}
OURS["ours bf16 compiled"] = [*OURS["ours bf16"], "--compile", "on"]
OURS_WITHOUT_BF16 = {"ours fp32": OURS["ours fp32"], "ours fp32 compiled": [*OURS["ours fp32"], "--compile", "on"]}
HELD_OUT = 100  # texts
HIDDEN_SIZE, LAYERS = 256, 4
LENGTH = 340  # of the reference, its own default


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
    peak, source = peak_flops(default_device(), dtype)
    shares = [speed * preset(model).flops_per_token(length) / peak for speed in speeds[best]]
    note = f"of the peak of {peak / 1e9:,.0f} GFLOP/s, {source}"
    return [*claims, Claim(f"{title}: MFU of {best}", shares, note=note)]


class Point(NamedTuple):
    """A moment of a run: what it took until then, and bits a byte of held-out text."""

    seconds: float
    tokens: float
    bits: float


def time_to_loss(
    peer: Path, text: Path | None = None, texts: int = 2560, batch: int = 32, accumulation: int = 8,
    share: float = 0.25, repeats: int = 3, points: int = 8,
) -> None:  # fmt: skip
    """Seconds and tokens until ours is where the reference ends, both with their own defaults, one after the other.

    Args:
        texts: one epoch of the reference; each repeat has others.
        batch, accumulation: of the reference, by default its own.
        share: of the reference's tokens that ours may see.
        points: evaluations of a run, which no clock counts; ours has twice as many.
    """
    curves: dict[str, list[list[Point]]] = {"minimind": [], "ours": []}
    with harness.workspace() as folder:
        reference = Peer.copied(peer, folder / "peer")
        found = read_texts(find_text(text, folder), HELD_OUT + texts * repeats)
        if len(found) < HELD_OUT + texts * repeats:
            raise SystemExit(f"the text has {len(found)} documents: lower --texts or --repeats, or give more --text")
        held_out = HeldOut.of(reference, found[:HELD_OUT])
        for number in range(repeats):
            own = folder / f"repeat {number + 1}"
            own.mkdir()
            start = HELD_OUT + number * texts
            file = harness.write_texts(own / "texts.jsonl", found[start : start + texts])
            tokens = sum(map(len, reference.read_tokens(found[start : start + texts], LENGTH)))
            curves["minimind"].append(train_theirs(peer, file, tokens, texts, held_out, (batch, accumulation, points)))
            curves["ours"].append(train_ours(file, reference.tokenizer, share * tokens, held_out, number, 2 * points))
            for name, runs in curves.items():
                print(f"  {own.name}: {name} {runs[-1][-1]}", file=sys.stderr, flush=True)
    reached = [
        next((point for point in ours if point.bits <= theirs[-1].bits), Point(math.inf, math.inf, ours[-1].bits))
        for theirs, ours in zip(curves["minimind"], curves["ours"], strict=True)
    ]
    ends = [theirs[-1] for theirs in curves["minimind"]]
    claims = [Claim("held-out loss at the end: minimind", [end.bits for end in ends], unit="bits a byte")]
    claims += [Claim("the same: ours", [run[-1].bits for run in curves["ours"]], unit="bits a byte")]
    for axis, unit, target in (("seconds", "s", 0.1 if has_fast_bf16() else 0.2), ("tokens", "", 0.25)):
        theirs, ours = ([getattr(point, axis) for point in points] for points in (ends, reached))
        claims += [Claim(f"{axis}: minimind", theirs, unit=unit), Claim(f"{axis}: ours until there", ours, unit=unit)]
        claims += [Claim(f"{axis}: ours over minimind", ratios(ours, theirs), target, at_least=False, unit="x")]
    report("time_to_loss", claims, {"curves": curves, "texts": texts, "batch": batch, "accumulation": accumulation})


class HeldOut(NamedTuple):
    """Text that nobody trains on, as the reference reads it, without its marks."""

    rows: list[list[int]]
    tokens_per_byte: float

    @classmethod
    def of(cls, reference: Peer, texts: Sequence[str]) -> "HeldOut":
        """The rows of some texts."""
        from transformers import AutoTokenizer

        rows = [row[1:-1] for row in reference.read_tokens(texts, LENGTH) if len(row) > 3]
        tokenizer = AutoTokenizer.from_pretrained(reference.folder / "model")
        num_bytes = sum(len(tokenizer.decode(row[1:]).encode()) for row in rows)
        return cls(rows, sum(len(row) - 1 for row in rows) / num_bytes)

    def bits(self, weights: Path, start: Sequence[int]) -> float:
        """Bits a byte of a model, read after the tokens in `start`."""
        loss = score(load_weights(weights, dtype=torch.float32), self.rows, start)
        return loss / math.log(2) * self.tokens_per_byte


def train_theirs(
    peer: Path, file: Path, tokens: int, texts: int, held_out: HeldOut, shape: tuple[int, int, int]
) -> list[Point]:
    """The reference's own trainer over one epoch. It stands still a step after each of its saves."""
    batch, accumulation, points = shape
    own = Peer.copied(peer, file.parent / "peer")
    steps = -(-texts // batch)
    every = max(2, steps // points)
    more = ["--hidden_size", HIDDEN_SIZE, "--num_hidden_layers", LAYERS, "--save_interval", every]
    command = own.command(file, LENGTH, batch, accumulation, *more)
    env = {**core_threads(), "HF_HOME": str(file.parent / "hf")}
    one = Contestant("minimind", command, Peer.pattern, every, own.folder / "trainer", env)
    weights = own.folder / "out" / f"pretrain_{HIDDEN_SIZE}.pth"
    seen: list[tuple[int, float]] = []
    with started([one], warm_steps=1):
        for turn in range((steps - 1) // every):
            one.take_turn()
            seen.append(((turn + 1) * every, held_out.bits(weights, [1])))
        one.finish()
        seen.append((steps, held_out.bits(weights, [1])))
    mean = sum(turn.wall_seconds for turn in one.turns) / sum(turn.steps for turn in one.turns)
    return [Point(step * mean, tokens * step / steps, bits) for step, bits in seen]


def train_ours(
    file: Path, tokenizer: Path, tokens: float, held_out: HeldOut, seed: int, points: int
) -> list[Point]:  # fmt: skip
    """`python -m minimind.train` with its own defaults; in bf16 where the processor multiplies so."""
    folder, tokens_per_step = file.parent, 8 * 512
    steps = max(points, round(tokens / tokens_per_step) // points * points)
    shards = make_shards(file, tokenizer, folder / "shards", val_fraction=0)
    flags: list[object] = ["--model", "minimind3", "--hidden-size", HIDDEN_SIZE, "--num-hidden-layers", LAYERS]
    flags += ["--shards", shards, "--run-dir", folder / "run", "--steps", steps, "--save-every", steps // points]
    # A save beside the next steps would be on their clock.
    flags += ["--keep-last", 0, "--seed", seed, "--no-tensorboard", "--no-async-save"]
    flags += ["--precision", "bf16" if has_fast_bf16() else "fp32"]
    run([sys.executable, "-m", "minimind.train", *flags], ROOT, **core_threads())
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    seconds = {record["step"]: record["step_seconds"] for record in records if "loss" in record}
    found = []
    for step in range(steps // points, steps + 1, steps // points):
        bits = held_out.bits(folder / "run" / "checkpoints" / f"step_{step:08d}", [])
        found.append(Point(sum(seconds[n] for n in range(1, step + 1)), step * tokens_per_step, bits))
    return found


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
    tyro.extras.subcommand_cli_from_dict({"speed": speed, "time-to-loss": time_to_loss})
