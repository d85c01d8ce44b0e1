"""Training speed beside the reference trainer and transformers' Qwen3: real tokens a second on the same text.

    python benchmarks/train.py --peer DIR [--text FILE.jsonl] [--lengths 340 512]

DIR is a checkout of jingyaogong/minimind. All programs are started, warmed up, and take turns on the whole machine; a
ratio is one turn of ours over the turn of the other in the same round. Real tokens are those of the texts with their
end marks; padding counts for nothing. A padded step takes as long whatever its texts are, so its real tokens are those
of a mean step: texts of a few steps happen to be long or short. Ours is the command itself, `python -m minimind.train`,
under ZeRO-1.
"""

import json
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
import tyro
from measure import ROOT, Claim, computes_in_bf16, core_threads, environment, ratios, report
from peer import PATTERN, Peer, micro_batches, read_texts
from texts import find_text, make_shards
from turns import Contestant, started, take_turns

from minimind.config.run_config import preset
from minimind.training.peak_flops import peak_flops

TARGETS = {340: 4.0, 512: 5.0}
FEWEST_TEXTS = 4000  # a mean over so many is within 2% of the corpus's
OURS = {
    "ours fp32": ("--precision", "fp32"),
    "ours bf16": ("--precision", "bf16"),
    "ours bf16 compiled": ("--precision", "bf16", "--compile"),
}
OURS_WITHOUT_BF16 = {
    "ours fp32": ("--precision", "fp32"),
    "ours fp32 compiled": ("--precision", "fp32", "--compile"),
}
STEP_IN_LOG = r'"step": (?P<step>\d+), "loss"'


def main(
    peer: Path | None = None,
    text: Path | None = None,
    lengths: tuple[int, ...] = (340, 512),
    rounds: int = 3,
    minutes: float = math.inf,
    batch: int = 8,
    accumulation: int = 2,
    steps: int = 2,
    model: str = "minimind3",
    programs: tuple[str, ...] | None = None,
    output: Path | None = None,
) -> None:
    """Measure.

    Args:
        peer: checkout of jingyaogong/minimind; without it only ours and Qwen3 run.
        text: JSONL with a `text` field [default: what `texts.py` finds on this machine].
        lengths: maximum lengths in tokens.
        rounds: turns of each, at most.
        minutes: time for all of it: fewer rounds are made on a slow machine.
        batch: sequences in a micro-batch, for all.
        accumulation: micro-batches in an optimizer step of the padded ones; ours takes half as many, rounded up:
            about as many real tokens, as nothing of it is padding.
        steps: micro-batches of the padded ones in a turn; ours makes as many optimizer steps.
        model: preset; the peer has the shape of minimind3.
        programs: names of those that take turns, one of ours among them [default: all].
        output: where the JSON goes.
    """
    where = environment()
    claims, measured = [], {}
    folder = Path(tempfile.mkdtemp(prefix="train-benchmark-"))
    try:
        source = find_text(text, folder)
        for length in lengths:
            deadline = time.perf_counter() + 60 * minutes / len(lengths)
            part = folder / str(length)
            rows = measure_length(
                length, peer, source, part, rounds, batch, accumulation, steps, model, deadline, programs
            )
            measured[str(length)] = {"text": str(source), **rows}
            claims += judge(length, rows)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report(__file__, where, claims, measured, output)


def measure_length(
    length: int,
    peer: Path | None,
    source: Path,
    folder: Path,
    rounds: int,
    batch: int,
    accumulation: int,
    steps: int,
    model: str,
    deadline: float,
    programs: tuple[str, ...] | None,
) -> dict:
    """Real tokens a second of each contestant, turn by turn."""
    folder.mkdir(parents=True)
    if peer is None:
        raise SystemExit(
            "--peer DIR: give a checkout of jingyaogong/minimind; its tokenizer and its trainer are needed"
        )
    reference = Peer.copied(peer, folder / "peer")
    needed = (rounds + 2) * (steps + 3) * batch * 2
    texts = read_texts(source, max(needed, FEWEST_TEXTS))
    part = folder / "texts.jsonl"
    part.write_text("".join(json.dumps({"text": item}, ensure_ascii=False) + "\n" for item in texts))
    rows = reference.read_tokens(texts, length)
    order = [index for indices in micro_batches(len(texts), batch) for index in indices]
    (folder / "tokens.json").write_text(json.dumps([rows[index] for index in order]))
    shards = make_shards(source, reference.tokenizer, folder / "shards")

    threads = core_threads()
    padded = {"pattern": PATTERN, "steps": steps, "env": {**threads, "HF_HOME": str(folder / "hf")}}
    command = reference.command(part, length=length, batch=batch, accumulation=accumulation)
    qwen3 = [sys.executable, str(ROOT / "benchmarks" / "padded_loop.py"), "--tokens", str(folder / "tokens.json")]
    qwen3 += ["--length", str(length), "--batch", str(batch), "--accumulation", str(accumulation), "--model", model]
    contestants = [
        Contestant("minimind", command, cwd=reference.folder / "trainer", **padded),
        Contestant("Qwen3", qwen3, **{**padded, "pattern": r"micro-batch (?P<step>\d+) "}),
    ]
    accumulated = -(-accumulation // 2)
    ours_here = OURS if computes_in_bf16() else OURS_WITHOUT_BF16
    for name, flags in ours_here.items():
        run_dir = folder / name.replace(" ", "-")
        ours = [sys.executable, "-m", "minimind.train", "--model", model, "--shards", str(shards), "--document-mask"]
        ours += ["--seq-len", str(length), "--micro-batch-size", str(batch), "--run-dir", str(run_dir)]
        ours += ["--gradient-accumulation-steps", str(accumulated), "--steps", "100000", "--no-tensorboard", *flags]
        ours += ["--ds-config", str(ROOT / "ds_configs" / "zero1.json")]
        log = run_dir / "metrics.jsonl"
        contestants.append(Contestant(name, ours, STEP_IN_LOG, steps, cwd=ROOT, env=threads, log=log))
    if programs is not None:
        names = [contestant.name for contestant in contestants]
        if not set(programs) <= set(names) or not set(programs) & set(ours_here):
            raise SystemExit(f"--programs {' '.join(programs)}: choose of {', '.join(names)}, one of ours among them")
        contestants = [contestant for contestant in contestants if contestant.name in programs]
    print(f"length {length}", file=sys.stderr)
    with started(contestants):
        take_turns(contestants, rounds, deadline)

    kept = sum(len(row) for row in rows)
    padded_tokens, our_tokens = batch * kept / len(rows), accumulated * batch * length
    speeds = {}
    for contestant in contestants:
        each = padded_tokens if contestant.log is None else our_tokens
        counts = [turn.steps * each for turn in contestant.turns]
        speeds[contestant.name] = {
            "tokens_per_second": [c / turn.wall_seconds for c, turn in zip(counts, contestant.turns, strict=True)],
            "tokens_per_cpu_second": [c / turn.cpu_seconds for c, turn in zip(counts, contestant.turns, strict=True)],
        }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if computes_in_bf16() else torch.float32
    peak, source_of_peak = peak_flops(device, dtype)
    flops = preset(model).flops_per_token(length)
    judged = [name for name in ours_here if name in speeds and ("bf16" in name) == (dtype == torch.bfloat16)]
    return {
        "speeds": speeds,
        "padding_share": 1 - kept / (len(rows) * length),
        "peak_flops": peak,
        "peak_dtype": str(dtype),
        "peak_source": source_of_peak,
        "mfu": {name: [v * flops / peak for v in speeds[name]["tokens_per_second"]] for name in judged},
    }


def judge(length: int, rows: dict) -> list[Claim]:
    """The lines of the table for one length."""
    speeds = {name: values["tokens_per_second"] for name, values in rows["speeds"].items()}
    claims = [
        Claim(f"training at {length}: {name}", tuple(values), unit="real tokens/s") for name, values in speeds.items()
    ]
    best = max(rows["mfu"], key=lambda name: sum(speeds[name]))
    for other, target in (("minimind", TARGETS.get(length)), ("Qwen3", None)):
        if other not in speeds:
            continue
        name = f"training at {length}: {best} over {other}"
        claims.append(Claim(name, ratios(speeds[best], speeds[other]), target, unit="x"))
    claims.append(Claim(f"training at {length}: MFU of {best}", tuple(rows["mfu"][best]), note="of the measured peak"))
    return claims


if __name__ == "__main__":
    tyro.cli(main)
