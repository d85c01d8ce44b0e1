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

ROOT = Path(__file__).resolve().parent.parent
OUT = Path(os.environ.get("BENCHMARKS_OUT") or ROOT / "benchmarks" / "out")
# A benchmark is started as a file, so the repository is not on the path; every one of them imports this module first.
sys.path.insert(0, str(ROOT))
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
    for machine in sorted({content["environment"]["machine"] for content in contents}):
        print(machine)
    print(format_table(promised))
    print(f"{sum(row['passed'] for row in promised)} of {len(promised)} reached")
    if all:
        print("\n" + format_table([row for row in rows if row["target"] is None]))


def environment() -> dict[str, Any]:
    """Date, device, cores, load and versions, without which a figure means nothing."""
    # Slow to import, and some benchmarks are about just that.
    from minimind.accelerator import accelerator_type, default_device, device_name
    from minimind.host import count_cores

    installed = {package.name: package.version for package in importlib.metadata.distributions()}
    versions = ", ".join(f"{name} {installed[name]}" for name in _PACKAGES if name in installed)
    cores, device = count_cores(), device_name(default_device()) if accelerator_type() else "cpu"
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": f"{cores} cores, {cpu_name()}, {device}; Python {platform.python_version()}, {versions}",
        "device": device,
        "load_at_start": round(LOAD_AT_START, 2),
        "threads": os.environ.get("OMP_NUM_THREADS", "torch's default"),
    }


def cpu_name() -> str:
    """The processor as the kernel names it, and the instruction sets that decide its speed here."""
    if sys.platform == "darwin":
        return run(["sysctl", "-n", "machdep.cpu.brand_string"], ROOT).strip()
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags", fields.get("Features", "")).split()  # ARM's word for them
    sets = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16") if name in flags]
    family = f"family {fields.get('cpu family', '?')} model {fields.get('model', fields.get('CPU part', '?'))}"
    return f"{fields.get('model name', platform.processor())} ({family}; {' '.join(sets)})"


def has_fast_bf16() -> bool:
    """Whether the training device multiplies in bf16; if not, bf16 is float32 and a rounding."""
    import torch

    from minimind.accelerator import accelerator_type, computes_bf16, default_device
    from minimind.model.kernels.matmul import has_fast_matmul

    return computes_bf16(default_device()) if accelerator_type() else has_fast_matmul(torch.bfloat16)


def core_threads() -> dict[str, str]:
    """Environment of a program that has all cores; a value that is set already is kept."""
    from minimind.host import count_cores

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
            synchronize()
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def synchronize() -> None:
    """Wait for the GPU, if this process uses one."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


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

    from minimind.accelerator import computes_bf16
    from minimind.config.deepspeed_file import load_ds_config
    from minimind.config.resolve import resolve_run
    from minimind.config.run_config import DataConfig, RunConfig, TrainConfig

    data = {name: run.pop(name) for name in ("seq_len", "document_mask") if name in run}
    return resolve_run(
        RunConfig(model=model, data=DataConfig(**data), train=TrainConfig(**{"optimizer": "adamw", **run})),
        load_ds_config(str(ROOT / "ds_configs" / f"zero{stage}.json")),
        world_size=env.world_size,
        local_world_size=env.local_world_size,
        device_type=device.type,
        bf16_supported=computes_bf16(device),
    )


def build_engine(model: Any, env: Any, device: Any, **run: Any) -> Any:
    """The engine that `minimind.train` builds, and its run as `resolve` gives it. Every rank calls this, inside
    `joined`."""
    from minimind.parallel import engine

    resolved = resolve(model, env, device, **run)
    return engine.build_engine(resolved, engine.build_model(resolved, device)), resolved


def train_evaluated(model: str, run_dir: Path, *flags: object) -> list[tuple[int, float]]:
    """`python -m minimind.train` to its end, or what is there of it: (step, bits a byte) of each evaluation."""
    command = [sys.executable, "-m", "minimind.train", "--model", model, "--run-dir", run_dir, "--no-tensorboard"]
    run([*command, *flags], ROOT)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["eval_bits_per_byte"]) for record in records if "eval_bits_per_byte" in record]


def transformers_model(config: Any, **options: Any) -> Any:
    """transformers' own model of the shape of one of our configs, its weights random."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from minimind.checkpoints.formats.huggingface_config import to_huggingface

    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**to_huggingface(config)), **options)


def find_text(given: Path | None, folder: Path) -> Path:
    """`given`, or the default corpus as a JSONL file in `folder`."""
    if given is None:
        path = folder / "text.jsonl"
        run_module("data_prep.default_corpus", "--output", path)
        return path
    if not given.is_file():
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


def run_module(module: str, *flags: object) -> None:
    """Run a module of this repository; its messages are shown only if it fails."""
    run([sys.executable, "-m", module, *flags], ROOT)


def run(command: Sequence[object], folder: Path, **env: str) -> str:
    """Run a program to its end; its output."""
    words = [str(part) for part in command]
    done = subprocess.run(words, cwd=folder, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{(done.stderr or done.stdout).strip()[-800:]}")
    return done.stdout


if __name__ == "__main__":
    import tyro

    tyro.cli(summarize)
