"""Decoding speed beside transformers' `generate`, in one run, on the same weights.

python benchmarks/generate.py [--model minimind3] [--new-tokens 256] [--repeats 3] [--threads 1]
"""

import functools
import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import tyro
from harness import Claim, ratios, report, run_module, time_rounds, transformers_model, workspace

from minimind.inference.decoding import Decoding, Row, decode
from minimind.inference.sampling import GenerationOptions
from minimind.model import PRESETS, MiniMindForCausalLM
from minimind.model.kernels.apply import apply_kernels
from minimind.model.kernels.packed_weights import prepare_decoding

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(
    model: str = "minimind3", new_tokens: int = 256, repeats: int = 3, threads: int = 1,
    checkpoint: Path | None = None, text: tuple[Path, ...] = (), waiting: int = 3000,
) -> None:  # fmt: skip
    """Measure.

    Args:
        model: preset, with random weights, whose speed is measured.
        checkpoint: a trained model, for the quality.
        text: files that the quality is measured on.
        waiting: tokens of an answer that a request of one token comes upon.
    """
    torch.set_num_threads(threads)
    rows = build_rows(model)
    for run in rows.values():
        run(8)
    seconds = time_rounds({name: functools.partial(run, new_tokens) for name, run in rows.items()}, repeats, warm_up=0)
    speeds = {name: [new_tokens / taken for taken in values] for name, values in seconds.items()}
    title = f"decoding {model}, {new_tokens} new tokens, {threads} threads"
    ours = [name for name in speeds if name.startswith("minimind")]
    fastest = max(ours, key=lambda name: statistics.median(speeds[name]))
    claims = []
    for way, target in (("minimind {}", 1.3), (fastest, 2.0)):
        for name in PRECISIONS:
            shares = ratios(speeds[way.format(name)], speeds[f"transformers {name}"])
            claims.append(Claim(f"{title}: {way.format(name)} over transformers {name}", shares, target, unit="x"))
    claims += [Claim(f"{title}: {name}", values, unit="tokens/s") for name, values in speeds.items()]
    joined, waited = measure_waiting("quickstart", waiting)
    name = f"quickstart, one token beside an answer of {waiting}: waiting for its end over joining it ({joined:.3f} s)"
    claims.append(Claim(name, (waited / joined,), 20.0, unit="x"))
    quality = measure_quality(checkpoint, text) if checkpoint is not None else {}
    claims += [Claim(f"quality of {checkpoint}: {name}", (bits,), unit="bits a byte") for name, bits in quality.items()]
    report(__file__, claims, {"tokens_per_second": speeds, "bits_per_byte": quality})


def build_rows(model: str) -> dict[str, Callable[[int], object]]:
    """What is measured: a name, and a function that decodes so many tokens."""
    torch.manual_seed(0)
    base = MiniMindForCausalLM(PRESETS[model]).eval()
    rows: dict[str, Callable[[int], object]] = {}
    for name, dtype in PRECISIONS.items():
        rows[f"transformers {name}"] = use_transformers(base, dtype)
        rows[f"minimind {name}"] = use_ours(copy_of(base, dtype))
    rows["minimind int8"] = use_ours(copy_of(base, torch.bfloat16, int8=True))
    if shutil.which("g++") is not None:  # without it torch.compile does not compile for a CPU
        compiled = copy_of(base, torch.bfloat16, int8=True)
        compiled.compile(dynamic=True)
        rows["minimind int8, compiled"] = use_ours(compiled)
    return rows


def copy_of(base: MiniMindForCausalLM, dtype: torch.dtype, *, int8: bool = False) -> MiniMindForCausalLM:
    """The same weights as another type, as the command loads them."""
    copy = MiniMindForCausalLM(base.config)
    copy.load_state_dict(base.state_dict())
    copy = copy.to(dtype).eval()
    apply_kernels(copy, "cpu")
    prepare_decoding(copy, int8=int8)
    return copy


def use_ours(model: MiniMindForCausalLM) -> Callable[[int], object]:
    def run(count: int) -> None:
        for _ in decode(model, [Row(PROMPT, GenerationOptions(temperature=0.0, max_new_tokens=count))]):
            pass

    return run


def measure_waiting(model: str, count: int) -> tuple[float, float]:
    """Seconds to a one-token answer beside a running one of `count` tokens: joined at once, and after its end."""
    ours = copy_of(MiniMindForCausalLM(PRESETS[model]), torch.float32)
    decoding = Decoding(ours)
    long, short = (Row(PROMPT, GenerationOptions(temperature=0.0, max_new_tokens=tokens)) for tokens in (count, 1))
    decoding.join([long])
    for _ in range(10):
        decoding.step()
    start = time.perf_counter()
    decoding.join([short])
    decoding.step()
    joined = time.perf_counter() - start
    while decoding.rows:
        decoding.step()
    return joined, time.perf_counter() - start


def use_transformers(base: MiniMindForCausalLM, dtype: torch.dtype) -> Callable[[int], object]:
    from transformers.utils import logging

    logging.set_verbosity_error()
    theirs = transformers_model(base.config)
    theirs.load_state_dict(base.state_dict())
    theirs = theirs.to(dtype).eval()
    theirs.generation_config.eos_token_id = None
    input_ids = torch.tensor([PROMPT])
    mask = torch.ones_like(input_ids)
    return lambda count: theirs.generate(input_ids, attention_mask=mask, max_new_tokens=count, do_sample=False)


def measure_quality(checkpoint: Path, files: tuple[Path, ...]) -> dict[str, float]:
    """Bits per byte of a trained model in each precision."""
    found = {}
    with workspace() as folder:
        for name, flags in (*((name, ("--precision", name)) for name in PRECISIONS), ("int8", ("--int8",))):
            what = ("--checkpoint", checkpoint, "--text", *files, "--seq-len", 256, "--device", "cpu")
            run_module("minimind.evaluate", *what, *flags, "--output", folder / name)
            found[name] = json.loads((folder / name).read_text())["bits_per_byte"]
    return found


if __name__ == "__main__":
    tyro.cli(main)
