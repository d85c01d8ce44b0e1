"""Beside the reference trainer on the same text: real tokens a second, and how long until the loss is as good.

python benchmarks/reference.py speed | time-to-loss --peer DIR [--text FILE.jsonl]
"""

import math
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import harness
import torch
import tyro
from harness import Claim, core_threads, find_text, has_fast_bf16, make_shards, ratios, read_texts, report, run_module
from transformers import AutoTokenizer
from turns import Contestant, our_trainer, started, take_turns

from minimind.accelerator import default_device
from minimind.checkpoints.formats.load_model import load_weights
from minimind.config.run_config import preset
from minimind.training.peak_flops import peak_flops
from minimind.training.record.run_files import METRICS_NAME, read_records, steps_of

TARGETS = {340: 4.0, 512: 5.0}
FEWEST_TEXTS = 4000  # a mean over so many is within 2% of the corpus's
OURS = {f"ours {precision}": ["--precision", precision] for precision in ("fp32", "bf16")}
OURS |= {f"{name} compiled": [*flags, "--compile", "on"] for name, flags in OURS.items()}
HELD_OUT = 100  # texts
HIDDEN_SIZE, LAYERS = 256, 4
LENGTH = 340  # of the reference, its own default


class Peer:
    """A copy in `folder` of a checkout of the reference trainer, ready to run."""

    pattern = r"Epoch:\[1/1\]\(\d+/\d+\)"  # the line that it prints after each micro-batch

    def __init__(self, checkout: Path, folder: Path) -> None:
        if not (checkout / "trainer" / "train_pretrain.py").is_file():
            raise SystemExit(f"--peer {checkout}: no checkout of jingyaogong/minimind (no trainer/train_pretrain.py)")
        for part in ("model", "trainer", "dataset"):
            shutil.copytree(checkout / part, folder / part)
        self.folder = folder
        self.tokenizer = folder / "model" / "tokenizer.json"
        self.reader = AutoTokenizer.from_pretrained(folder / "model")

    def trainer(self, text: Path, length: int, batch: int, accumulation: int, steps: int, *more: object) -> Contestant:
        """Its own trainer on `text` (JSONL), on the CPU or the first GPU, `steps` micro-batches a turn."""
        flags: list[object] = ["--data_path", text, "--max_seq_len", length, "--batch_size", batch, "--epochs", 1]
        flags += ["--accumulation_steps", accumulation, "--log_interval", 1, "--num_workers", 1]
        flags += ["--save_dir", self.folder / "out", "--save_interval", 10**9, *more]
        command = [sys.executable, "train_pretrain.py", *map(str, flags)]
        env = {**core_threads(), "HF_HOME": str(self.folder / "hf")}
        return Contestant("minimind", command, self.pattern, steps, self.folder / "trainer", env)

    def read_tokens(self, texts: Sequence[str], length: int) -> list[list[int]]:
        """Each text as its dataset gives it to the model, without the padding."""
        encoded = self.reader(list(texts), add_special_tokens=False, max_length=length - 2, truncation=True).input_ids
        return [[self.reader.bos_token_id, *tokens, self.reader.eos_token_id] for tokens in encoded]


class HeldOut:
    """Text that nobody trains on, as the reference reads it, without its marks."""

    def __init__(self, reference: Peer, texts: Sequence[str]) -> None:
        self.rows = [row[1:-1] for row in reference.read_tokens(texts, LENGTH) if len(row) > 3]
        # Nobody has to predict a row's first token.
        self.num_bytes = sum(len(reference.reader.decode(row[1:]).encode()) for row in self.rows)

    @torch.no_grad()
    def bits(self, weights: Path, start: Sequence[int]) -> float:
        """Bits a byte of a model: every token but the first of each row, read after the tokens in `start`."""
        model, total = load_weights(weights, dtype=torch.float32), 0.0
        for row in self.rows:
            tokens = torch.tensor([[*start, *row]])
            labels = tokens[:, 1:].clone()
            labels[:, : len(start)] = -100
            total += float(model(tokens[:, :-1], labels, loss_reduction="sum").loss)
        return total / math.log(2) / self.num_bytes


def speed(
    peer: Path, text: Path | None = None, lengths: tuple[int, ...] = (340, 512), rounds: int = 3,
    minutes: float = math.inf, batch: int = 8, accumulation: int = 2, steps: int = 2,
    programs: tuple[str, ...] | None = None,
) -> None:  # fmt: skip
    """Real tokens a second.

    Args:
        batch: sequences in a micro-batch, for all.
        accumulation: micro-batches in an optimizer step of the reference; ours takes half as many, rounded up: about
            as many real tokens, as nothing of it is padding.
        steps: micro-batches of the reference in a turn; ours makes as many optimizer steps.
        programs: names of those that take turns, one of ours among them [default: all].
    """
    claims, measured = [], {}
    fastest = "bf16" if has_fast_bf16() else "fp32"
    programs = programs or ("minimind", *dict.fromkeys(("ours fp32", f"ours {fastest}", f"ours {fastest} compiled")))
    if not set(programs) <= {"minimind", *OURS} or not set(programs) & set(OURS):
        raise SystemExit(f"--programs {' '.join(programs)}: minimind and {', '.join(OURS)}; one of ours among them")
    for length in lengths:
        with harness.workspace() as folder:
            reference = Peer(peer, folder / "peer")
            source = find_text(text, folder)
            texts = read_texts(source, max((rounds + 2) * (steps + 3) * batch * 2, FEWEST_TEXTS))
            rows = reference.read_tokens(texts, length)
            shards = make_shards(source, reference.tokenizer, folder / "shards")
            written = harness.write_texts(folder / "texts.jsonl", texts)
            theirs = reference.trainer(written, length, batch, accumulation, steps)
            contestants = [theirs] if theirs.name in programs else []
            accumulated = -(-accumulation // 2)
            flags = ["--model", "minimind3", "--shards", shards, "--seq-len", length, "--micro-batch-size", batch]
            flags += ["--gradient-accumulation-steps", accumulated, "--no-tensorboard"]
            for name in [name for name in OURS if name in programs]:
                run_dir = folder / name.replace(" ", "-")
                contestants.append(our_trainer(name, run_dir, [*flags, *OURS[name]], steps, core_threads()))
            print(f"length {length}", file=sys.stderr)
            with started(contestants) as began:
                take_turns(contestants, rounds, began + 60 * minutes / len(lengths))
        kept = sum(map(len, rows))
        tokens = {"minimind": batch * kept / len(rows), **dict.fromkeys(OURS, accumulated * batch * length)}
        speeds = {one.name: [tokens[one.name] / seconds for seconds in one.seconds] for one in contestants}
        claims += judge(length, speeds)
        padding = 1 - kept / (len(rows) * length)
        measured[str(length)] = {"text": str(source), "padding_share": padding, "tokens_per_second": speeds}
    report("train", claims, measured)


def judge(length: int, speeds: dict[str, list[float]]) -> list[Claim]:
    """The lines of the table for one length."""
    title = f"training at {length}"
    claims = [Claim(f"{title}: {name}", values, unit="real tokens/s") for name, values in speeds.items()]
    best = max([name for name in speeds if name.startswith("ours")], key=lambda name: sum(speeds[name]))
    dtype = torch.bfloat16 if "bf16" in best else torch.float32
    if "minimind" in speeds:
        shares = ratios(speeds[best], speeds["minimind"])
        claims.append(Claim(f"{title}: {best} over minimind", shares, TARGETS.get(length), unit="x"))
    peak, source = peak_flops(default_device(), dtype)
    shares = [speed * preset("minimind3").flops_per_token(length) / peak for speed in speeds[best]]
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
        reference = Peer(peer, folder / "peer")
        found = read_texts(find_text(text, folder), HELD_OUT + texts * repeats)
        if len(found) < HELD_OUT + texts * repeats:
            raise SystemExit(f"the text has {len(found)} documents: lower --texts or --repeats, or give more --text")
        held_out = HeldOut(reference, found[:HELD_OUT])
        for number in range(repeats):
            own = folder / f"repeat {number + 1}"
            own.mkdir()
            start = HELD_OUT + number * texts
            file = harness.write_texts(own / "texts.jsonl", found[start : start + texts])
            tokens = sum(map(len, reference.read_tokens(found[start : start + texts], LENGTH)))
            curves["minimind"].append(train_theirs(peer, file, tokens, texts, held_out, batch, accumulation, points))
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


def train_theirs(
    peer: Path, file: Path, tokens: int, texts: int, held_out: HeldOut, batch: int, accumulation: int, points: int
) -> list[Point]:
    """The reference's own trainer over one epoch. It stands still a step after each of its saves."""
    own = Peer(peer, file.parent / "peer")
    steps = -(-texts // batch)
    every = max(2, steps // points)
    more = ["--hidden_size", HIDDEN_SIZE, "--num_hidden_layers", LAYERS, "--save_interval", every]
    one = own.trainer(file, LENGTH, batch, accumulation, every, *more)
    weights = own.folder / "out" / f"pretrain_{HIDDEN_SIZE}.pth"
    seen: list[tuple[int, float]] = []
    with started([one], warm_steps=1):
        for turn in range((steps - 1) // every):
            one.take_turn()
            seen.append(((turn + 1) * every, held_out.bits(weights, [1])))
        one.finish()
        seen.append((steps, held_out.bits(weights, [1])))
    return [Point(step * statistics.mean(one.seconds), tokens * step / steps, bits) for step, bits in seen]


def train_ours(file: Path, tokenizer: Path, tokens: float, held_out: HeldOut, seed: int, points: int) -> list[Point]:
    """`python -m minimind.train` with its own defaults; in bf16 where the processor multiplies so."""
    folder, tokens_per_step = file.parent, 8 * 512
    steps = max(points, round(tokens / tokens_per_step) // points * points)
    shards = make_shards(file, tokenizer, folder / "shards", val_fraction=0)
    flags: list[object] = ["--model", "minimind3", "--hidden-size", HIDDEN_SIZE, "--num-hidden-layers", LAYERS]
    flags += ["--shards", shards, "--run-dir", folder / "run", "--steps", steps, "--save-every", steps // points]
    # A save beside the next steps would be on their clock.
    flags += ["--keep-last", 0, "--seed", seed, "--no-tensorboard", "--no-async-save"]
    flags += ["--precision", "bf16" if has_fast_bf16() else "fp32"]
    run_module("minimind.train", *flags, **core_threads())
    seconds = [record["step_seconds"] for record in steps_of(read_records(folder / "run" / METRICS_NAME))]
    found = []
    for step in range(steps // points, steps + 1, steps // points):
        bits = held_out.bits(folder / "run" / "checkpoints" / f"step_{step:08d}", [])
        found.append(Point(sum(seconds[:step]), step * tokens_per_step, bits))
    return found


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"speed": speed, "time-to-loss": time_to_loss})
