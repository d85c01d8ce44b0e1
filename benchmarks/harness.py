"""What all benchmarks share: claims with targets, rounds, text and shards, the engine, the table and its JSON.

python benchmarks/harness.py [--all]        # one table of everything that the benchmarks have written
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# A benchmark is started as a file, so the repository is not on the path; every one of them imports this module first.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from minimind.accelerator import accelerator_type, computes_bf16, default_device, device_name, synchronize
from minimind.checkpoints.formats.huggingface_config import to_huggingface
from minimind.config.deepspeed_file import load_ds_config
from minimind.config.resolve import resolve_run
from minimind.config.run_config import DataConfig, RunConfig, TrainConfig
from minimind.files import ROOT
from minimind.host import count_cores
from minimind.model.kernels.matmul import has_fast_matmul
from minimind.reports.doctor.finding import cpu_name
from minimind.training.record.run_files import METRICS_NAME, evaluations_of, read_records

OUT = Path(os.environ.get("BENCHMARKS_OUT") or ROOT / "benchmarks" / "out")
LOAD_AT_START = os.getloadavg()[0]
_PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "sentencepiece", "tokenizers")


@dataclass(frozen=True)
class Claim:
    """One line of the table: what is claimed, what was found.

    `values` are the repeats, in the target's unit: the median counts. `target` None: measured, nothing promised.
    """

    name: str
    values: Sequence[float]
    target: float | None = None
    at_least: bool = True
    unit: str = ""
    note: str = ""

    @property
    def passed(self) -> bool | None:
        """Whether the median reaches the target; None without a target."""
        if self.target is None:
            return None
        median = statistics.median(self.values)
        return median >= self.target if self.at_least else median <= self.target

    def to_dict(self) -> dict[str, Any]:
        """The figures that the table shows."""
        fields = asdict(self)
        name, values = fields.pop("name"), fields.pop("values")
        figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        return {"claim": name, **fields, **figures, "repeats": len(values), "passed": self.passed}


def report(script: str, claims: Sequence[Claim], measured: dict[str, Any], path: Path | None = None) -> None:
    """Print the table of one benchmark and write its JSON [default: `out/SCRIPT.json`]."""
    where, rows = environment(), [claim.to_dict() for claim in claims]
    print(f"{script}: {where['machine']}, load {where['load_at_start']} at start")
    print(format_table(rows))
    path = path or OUT / f"{Path(script).stem}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"script": Path(script).name, "environment": where, "claims": rows, "measured": measured}
    path.write_text(json.dumps(content, indent=1) + "\n")


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: claim, target, median, min, max, share of the target that was reached, and whether that is enough."""
    lines = ["| Claim | Target | Median | Min | Max | Reached / target | |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        sign, unit = (">=" if row["at_least"] else "<="), f" {row['unit']}" if row["unit"] else ""
        target = "" if row["target"] is None else f"{sign} {_figure(row['target'])}{unit}"
        share = "" if not row["target"] else f"{row['median'] / row['target']:.2f}"
        verdict = {True: "pass", False: "NOT REACHED", None: ""}[row["passed"]]
        figures = " | ".join(_figure(row[key]) for key in ("median", "min", "max"))
        name = row["claim"] + (f" ({row['note']})" if row["note"] else "")
        lines.append(f"| {name} | {target} | {figures} | {share} | {verdict} |")
    return "\n".join(lines)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def summarize(all: bool = False) -> None:
    """One table of what the benchmarks wrote: claims with a target, or with `all` the other figures too."""
    contents = [json.loads(path.read_text()) for path in sorted(OUT.glob("*.json"))]
    rows = [row for content in contents for row in content["claims"]]
    promised = [row for row in rows if row["target"] is not None]
    print(*sorted({content["environment"]["machine"] for content in contents}), format_table(promised), sep="\n")
    print(f"{sum(row['passed'] for row in promised)} of {len(promised)} reached")
    if all:
        print("\n" + format_table([row for row in rows if row["target"] is None]))


def environment() -> dict[str, Any]:
    """Date, device, cores, load and versions, without which a figure means nothing."""
    installed = {package.name: package.version for package in importlib.metadata.distributions()}
    versions = ", ".join(f"{name} {installed[name]}" for name in _PACKAGES if name in installed)
    device = device_name(default_device()) if accelerator_type() else "cpu"
    products = f"{device} {'with' if has_fast_bf16() else 'without'} products in bf16"
    python = f"Python {platform.python_version()}, {versions}"
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": f"{count_cores()} cores, {cpu_name()}, {products}; {python}",
        "device": device,
        "load_at_start": round(LOAD_AT_START, 2),
        "threads": os.environ.get("OMP_NUM_THREADS", "torch's default"),
    }


def has_fast_bf16() -> bool:
    """Whether the training device multiplies in bf16; if not, bf16 is float32 and a rounding."""
    return computes_bf16(default_device()) if accelerator_type() else has_fast_matmul(torch.bfloat16)


def core_threads() -> dict[str, str]:
    """Environment of a program that has all cores; a value that is set already is kept."""
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(count_cores()))}


def ratios(above: Sequence[float], below: Sequence[float]) -> tuple[float, ...]:
    """Round by round, one over the other: what a busy machine does to both at once falls out."""
    return tuple(a / b for a, b in zip(above, below, strict=True))


def time_rounds(ways: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each way, one after the other in every round, after `warm_up` rounds that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-warm_up, rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            synchronize(default_device())
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """A temporary folder."""
    with tempfile.TemporaryDirectory(prefix="benchmark-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@contextlib.contextmanager
def joined() -> Iterator[tuple[Any, Any]]:
    """This rank's environment and device, inside its process group, as `minimind.train` sets them up."""
    from minimind.distributed.cpu_tuning import keep_freed_memory
    from minimind.distributed.environment import find_device, read_environment
    from minimind.distributed.process_group import process_group

    env = read_environment()
    device = find_device(env)
    if device.type == "cpu":
        keep_freed_memory()
    with process_group(env, device):
        yield env, device


def resolve(model: Any, env: Any, device: Any, *, stage: int = 1, **run: Any) -> Any:
    """`run` (fields of DataConfig and TrainConfig) as `minimind.train` resolves it, under our JSON of `stage`."""
    data = {name: run.pop(name) for name in ("seq_len", "document_mask") if name in run}
    return resolve_run(
        RunConfig(model=model, data=DataConfig(**data), train=TrainConfig(**{"optimizer": "adamw", **run})),
        load_ds_config(str(ROOT / "ds_configs" / f"zero{stage}.json")),
        world_size=env.world_size,
        local_world_size=env.local_world_size,
        device_type=device.type,
        bf16_supported=computes_bf16(device),
    )


def train_evaluated(model: str, run_dir: Path, *flags: object) -> list[tuple[int, float]]:
    """`python -m minimind.train` to its end, or what is there of it: (step, bits a byte) of each evaluation."""
    run_module("minimind.train", "--model", model, "--run-dir", run_dir, "--no-tensorboard", *flags)
    found = evaluations_of(read_records(run_dir / METRICS_NAME))
    return [(record["step"], record["eval_bits_per_byte"]) for record in found]


def transformers_model(ours: Any, **options: Any) -> Any:
    """transformers' own model of the shape and the weights of one of ours."""
    from transformers import AutoConfig, AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**to_huggingface(ours.config)), **options)
    theirs.load_state_dict(ours.state_dict())
    return theirs


def find_text(given: Path | None, folder: Path) -> Path:
    """`given`, or the default corpus as a JSONL file in `folder`."""
    if given is None:
        run_module("data_prep.default_corpus", "--output", given := folder / "text.jsonl")
    elif not given.is_file():
        raise SystemExit(f"--text {given}: no such file")
    return given.resolve()


def read_texts(path: Path, limit: int | None = None) -> list[str]:
    """The `text` fields of a JSONL file, at most `limit`."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for _, line in zip(range(limit or 1 << 60), file, strict=False)]


def write_texts(path: Path, texts: Sequence[str]) -> Path:
    """A JSONL file of `text` fields."""
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def make_tokenizer(source: Path, folder: Path, vocab_size: int = 6400, *more: str) -> Path:
    """A tokenizer trained on `source`, in `folder`."""
    run_module("data_prep.train_tokenizer", "--input", source, "--output", folder, "--vocab-size", vocab_size, *more)
    return folder


def make_shards(source: Path, tokenizer: Path, folder: Path, val_fraction: float = 0.01) -> Path:
    """Shards of `source` by `tokenizer` in `folder`."""
    flags = ("--input", source, "--tokenizer", tokenizer, "--output", folder, "--val-fraction", val_fraction)
    run_module("data_prep.tokenize_corpus", *flags)
    return folder


def run_module(module: str, *flags: object, **env: str) -> None:
    """Run a module of this repository; its messages are shown only if it fails."""
    run([sys.executable, "-m", module, *flags], **env)


def run(command: Sequence[object], **env: str) -> str:
    """Run a program to its end; its output."""
    words = [str(part) for part in command]
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{(done.stderr or done.stdout).strip()[-800:]}")
    return done.stdout


if __name__ == "__main__":
    import tyro

    tyro.cli(summarize)
