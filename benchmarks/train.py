"""Training speed beside the reference trainer: real tokens a second on the same text.

python benchmarks/train.py --peer DIR [--text FILE.jsonl] [--lengths 340 512]
"""

import math
import sys
from pathlib import Path

import torch
import tyro
from harness import Claim, core_threads, find_text, has_fast_bf16, make_shards, ratios, read_texts, report, workspace
from harness import write_texts as write
from turns import Contestant, Peer, our_trainer, started, take_turns

from minimind.config.run_config import preset
from minimind.training.peak_flops import peak_flops

TARGETS = {340: 4.0, 512: 5.0}
FEWEST_TEXTS = 4000  # a mean over so many is within 2% of the corpus's
OURS = {"ours fp32": ["--precision", "fp32"], "ours bf16": ["--precision", "bf16"]}
OURS["ours bf16 compiled"] = [*OURS["ours bf16"], "--compile", "on"]
OURS_WITHOUT_BF16 = {"ours fp32": OURS["ours fp32"], "ours fp32 compiled": [*OURS["ours fp32"], "--compile", "on"]}


def main(
    peer: Path, text: Path | None = None, lengths: tuple[int, ...] = (340, 512), rounds: int = 3,
    minutes: float = math.inf, batch: int = 8, accumulation: int = 2, steps: int = 2, model: str = "minimind3",
    programs: tuple[str, ...] | None = None,
) -> None:  # fmt: skip
    """Measure.

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
        with workspace() as folder:
            reference = Peer.copied(peer, folder / "peer")
            source = find_text(text, folder)
            texts = read_texts(source, max((rounds + 2) * (steps + 3) * batch * 2, FEWEST_TEXTS))
            rows = reference.read_tokens(texts, length)
            shards = make_shards(source, reference.tokenizer, folder / "shards")
            threads = core_threads()
            command = reference.command(write(folder / "texts.jsonl", texts), length, batch, accumulation)
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
    report(__file__, claims, measured)


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


if __name__ == "__main__":
    tyro.cli(main)
