"""Decoding speed beside transformers' `generate`, in one run, on the same weights.

    python benchmarks/generate.py [--model minimind3] [--new-tokens 256] [--repeats 3] [--threads 1]

Every row decodes greedily from the same prompt, alone, without an end; rows take turns, and medians count. With
`--checkpoint` and `--text` it also says what each precision costs in bits per byte. Prints a table and writes JSON.
"""

import contextlib
import io
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import tyro
from measure import Claim, environment, ratios, report

from minimind import export
from minimind.checkpoints.formats.huggingface_config import to_huggingface
from minimind.checkpoints.formats.load_model import load_model
from minimind.checkpoints.safetensors import write_shards
from minimind.data.dataset import TokenDataset
from minimind.inference.decoding import Decoding
from minimind.inference.evaluation import evaluate, shards_of_texts
from minimind.inference.sampling import SamplingOptions
from minimind.model import PRESETS, MiniMindForCausalLM
from minimind.model.kernels.packed_weights import prepare_decoding, quantize_int8

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
GREEDY = SamplingOptions(temperature=0.0)


def main(
    model: str = "minimind3",
    new_tokens: int = 256,
    repeats: int = 3,
    threads: int = 1,
    checkpoint: Path | None = None,
    text: tuple[Path, ...] = (),
    output: Path | None = None,
) -> None:
    """Measure.

    Args:
        model: preset, with random weights, whose speed is measured.
        new_tokens: tokens a row decodes.
        repeats: runs of each row; they take turns, and medians count.
        threads: of torch.
        checkpoint: a trained model, for the quality.
        text: files that the quality is measured on.
        output: where the JSON goes.
    """
    where = environment()
    torch.set_num_threads(threads)
    rows = build_rows(model)
    speeds: dict[str, list[float]] = {name: [] for name in rows}
    for run in rows.values():
        run(8)
    for _ in range(repeats):
        for name, run in rows.items():
            start = time.perf_counter()
            run(new_tokens)
            speeds[name].append(new_tokens / (time.perf_counter() - start))
    title = f"{model}, {new_tokens} new tokens, {threads} threads"
    claims = [
        Claim(f"decoding {title}: {name} over transformers", ratios(speeds[f"minimind {name}"], theirs), 1.3, unit="x")
        for name, theirs in ((name, speeds[f"transformers {name}"]) for name in PRECISIONS)
    ]
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    fastest = max((name for name in medians if name.startswith("minimind")), key=lambda name: medians[name])
    for name in PRECISIONS:
        goal = f"decoding {title}: {fastest} over transformers {name}"
        claims.append(Claim(goal, ratios(speeds[fastest], speeds[f"transformers {name}"]), 2.0, unit="x"))
    claims += [Claim(f"decoding {title}: {name}", tuple(values), unit="tokens/s") for name, values in speeds.items()]
    quality = measure_quality(checkpoint, text) if checkpoint is not None else {}
    claims += [Claim(f"quality of {checkpoint}: {name}", (bits,), unit="bits a byte") for name, bits in quality.items()]
    report(__file__, where, claims, {"tokens_per_second": speeds, "bits_per_byte": quality}, output)


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
    prepare_decoding(copy, int8=int8)
    return copy


def use_ours(model: MiniMindForCausalLM) -> Callable[[int], object]:
    def run(count: int) -> None:
        decoding = Decoding(model, [PROMPT], [GREEDY], max_new_tokens=count)
        while not decoding.is_done:
            decoding.step()

    return run


def use_transformers(base: MiniMindForCausalLM, dtype: torch.dtype) -> Callable[[int], object]:
    """An export, loaded by transformers."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        source = export.ModelSource(Path(folder), base.config, {}, base.state_dict().__getitem__, None)
        parts = {part.name: part.shape for part in export.lay_out(base.config, "per_expert")}
        read = export.reader(source, "per_expert", torch.float32)
        write_shards(Path(folder), parts, read, dtype=torch.float32, max_shard_bytes=1 << 40)
        Path(folder, "config.json").write_text(json.dumps(to_huggingface(base.config)), encoding="utf-8")
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    theirs.generation_config.eos_token_id = None
    input_ids = torch.tensor([PROMPT])
    mask = torch.ones_like(input_ids)
    return lambda count: theirs.generate(input_ids, attention_mask=mask, max_new_tokens=count, do_sample=False)


def measure_quality(checkpoint: Path, files: tuple[Path, ...]) -> dict[str, float]:
    """Bits per byte of a trained model in each precision."""
    found = {}
    for name, dtype in {**PRECISIONS, "int8": torch.bfloat16}.items():
        model, tokenizer_file = load_model(checkpoint, dtype=dtype)
        if name == "int8":
            quantize_int8(model)
        with shards_of_texts(files, tokenizer_file) as reader:
            found[name] = evaluate(model, TokenDataset(reader, 256, keep_tail=True)).bits_per_byte
    return found


if __name__ == "__main__":
    tyro.cli(main)
