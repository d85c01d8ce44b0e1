"""The memory of a GPU at each moment of a run, beside the plan: 30 settings on simulated GPUs, or on the real one.

python tests/support/memory_moments.py > benchmarks/memory.md       all of them, as a page; some minutes

tests/simulated_cuda/test_memory_moments.py holds a few of them.
"""

import contextlib
import dataclasses
import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from repository import ROOT

sys.path.insert(0, str(ROOT))

WIDE = {"hidden_size": 512, "num_hidden_layers": 3, "vocab_size": 4096}
EXPERTS = {**WIDE, "num_hidden_layers": 2, "use_moe": True, "num_experts": 8, "num_experts_per_tok": 2,
           "moe_intermediate_size": 384}  # fmt: skip
Setting = dict[str, Any]
MIB = 2**20


def setting(file: str, ranks: int = 1, precision: str = "bf16", *, model: Any = WIDE, **train: Any) -> Setting:
    """A run: one of ds_configs/, and what differs from 2 x 128 tokens a micro-batch."""
    return {"file": file, "ranks": ranks, "precision": precision, "model": model, "train": train}


# Those of one rank are measured by benchmarks/gpu.sh too.
SETTINGS = [
    setting("zero0", precision="fp32"),
    setting("zero0"),
    setting("zero1", precision="fp32"),
    setting("zero1"),
    setting("zero1", precision="fp16"),
    setting("zero2"),
    setting("zero3"),
    setting("zero3", precision="fp32"),
    setting("zero1", micro_batch_size=12),
    setting("zero1", micro_batch_size=12, activation_checkpointing=True),
    setting("zero2", gradient_accumulation_steps=2),
    setting("zero1", model=EXPERTS),
    setting("zero2", precision="fp32"),
    setting("zero2", precision="fp16"),
    setting("zero3", precision="fp16"),
    setting("zero3", micro_batch_size=12),
    setting("zero0", model=EXPERTS, precision="fp32"),
    setting("zero2", model=EXPERTS),
    setting("zero3", model=EXPERTS),
    setting("zero1", model=EXPERTS, moe_backend="deepspeed"),
    setting("zero0", 2),
    setting("zero1", 2),
    setting("zero1", 2, "fp32"),
    setting("zero2", 2),
    setting("zero3", 2),
    setting("zero3", 2, "fp32"),
    setting("zero1", 2, model=EXPERTS, ep_size=2),
    setting("zero2", 2, model=EXPERTS, ep_size=2),
    setting("zero3", 2, model=EXPERTS, ep_size=2),
    setting("zero1", 2, model=EXPERTS, ep_size=2, moe_backend="deepspeed"),
]


def title(one: Setting) -> str:
    """The setting in a few words."""
    more = ", ".join(f"{name} {value}" for name, value in one["train"].items())
    kind = "experts" if one["model"].get("use_moe") else "dense"
    return f"{one['file']}, {one['precision']}, {kind}, {one['ranks']} rank{'s' * (one['ranks'] > 1)}" + (
        f", {more}" if more else ""
    )


def measure_moments(settings: list[Setting], folder: str) -> list[dict[str, int]]:
    """Bytes of each setting on this rank: the most allocated at each moment, and the plan's. Every rank calls this."""
    from minimind.distributed.environment import find_device, read_environment
    from minimind.distributed.process_group import process_group

    env = read_environment()
    device = find_device(env)
    found = []
    with process_group(env, device):
        for number, one in enumerate(settings):
            found.append(_measure(one, env, device, Path(folder) / str(number)))
    return found


def _measure(one: Setting, env: Any, device: Any, folder: Path) -> dict[str, int]:
    import torch

    from minimind.checkpoints.loading import prove_resumable
    from minimind.config.deepspeed_file import load_ds_config
    from minimind.config.resolve import resolve_run
    from minimind.config.run_config import DataConfig, RunConfig, TrainConfig
    from minimind.inference.evaluation import measure_loss
    from minimind.model.presets import PRESETS
    from minimind.reports.plan import trial
    from minimind.reports.plan.memory import estimate_memory

    train = {"micro_batch_size": 2, "steps": 3, "optimizer": "adamw", **one["train"]}
    run = RunConfig(
        model=dataclasses.replace(PRESETS["quickstart"], **one["model"]),
        data=DataConfig(seq_len=128),
        train=TrainConfig(precision=one["precision"], run_dir=str(folder), **train),
    )
    ds = load_ds_config(str(ROOT / "ds_configs" / f"{one['file']}.json"))
    resolved = resolve_run(run, ds, world_size=env.world_size, num_samples=10**6, device_type=device.type,
                           bf16_supported=True)  # fmt: skip
    gc.collect()
    plan = estimate_memory(resolved, device.type)
    base, found = trial.held_bytes(device), {"planned": plan.total}

    @contextlib.contextmanager
    def moment(name: str) -> Iterator[None]:
        trial.reset_peak(device)
        yield
        found[name] = trial.peak_bytes(device) - base

    (folder / f"rank{env.rank}").mkdir(parents=True, exist_ok=True)
    with moment("start"):
        trainer = trial.make_trainer(resolved, env, device, folder / f"rank{env.rank}")
    with moment("step"):
        for number in range(3):
            trainer.train_step(trainer.loader.step_batches(number))
        trainer._pending.clear()
    with moment("evaluation"):
        measure_loss(trainer.engine, trainer.loader.dataset, device, micro_batch_size=train["micro_batch_size"],
                     dp_rank=env.rank, dp_size=env.world_size)  # fmt: skip
    with moment("save"):
        trainer.saver.start(trainer.state)
        saved = trainer.saver.wait()
    with moment("load"):
        prove_resumable(trainer.engine, resolved, saved)
    trainer.saver.close()
    trainer.engine.destroy()
    del trainer
    gc.collect()
    torch.cuda.synchronize()
    found["left"] = trial.held_bytes(device) - base
    return found


MOMENTS = ("start", "step", "evaluation", "save", "load")


def measure_all(settings: list[Setting]) -> list[dict[str, int]]:
    """The figures of rank 0, in the order of `settings`, in one process a rank for each number of ranks."""
    from simulated_ranks import simulated_ranks

    found: dict[int, dict[str, int]] = {}
    for ranks in sorted({one["ranks"] for one in settings}):
        numbers = [number for number, one in enumerate(settings) if one["ranks"] == ranks]
        with contextlib.contextmanager(simulated_ranks)(ranks) as pool, tempfile.TemporaryDirectory() as folder:
            for number in numbers:
                print(title(settings[number]), file=sys.stderr, flush=True)
                ((figures,), *_) = pool.run(measure_moments, [settings[number]], f"{folder}/{number}")
                print(json.dumps({name: round(size / MIB) for name, size in figures.items()}), file=sys.stderr)
                found[number] = figures
    return [found[number] for number in range(len(settings))]


PAGE = """# Memory of a GPU at each moment, beside the plan

`python tests/support/memory_moments.py`, {date}, torch {torch}, DeepSpeed {deepspeed}: MiB allocated on **simulated**
devices, the most at each moment of rank 0; nothing here was measured on a GPU. Models of {sizes} million parameters
(dense, experts), 2 x 128 tokens a micro-batch unless a row says more. The plan is what `python -m minimind.plan` gives
for the peak of a step. Loading is that of a run's first save. {verdict}

| setting | plan | start | step | evaluation | save | load | highest, over plan |
|---|---|---|---|---|---|---|---|
{rows}
"""


def write_page() -> str:
    """All settings, as Markdown."""
    from importlib.metadata import version

    from minimind.model.presets import PRESETS

    rows, off = [], 0
    for one, found in zip(SETTINGS, measure_all(SETTINGS), strict=True):
        highest = max(found[name] for name in MOMENTS)
        off += not is_as_planned(highest, found["planned"])
        cells = [f"{found[name] / MIB:.0f}" for name in ("planned", *MOMENTS)]
        rows.append(f"| {title(one)} | {' | '.join(cells)} | {highest / found['planned']:.2f} |")
    sizes = [dataclasses.replace(PRESETS["quickstart"], **model).num_params() / 1e6 for model in (WIDE, EXPERTS)]
    return PAGE.format(
        date=time.strftime("%Y-%m-%d"), torch=version("torch"), deepspeed=version("deepspeed"),
        sizes=" and ".join(f"{size:.1f}" for size in sizes), rows="\n".join(rows),
        verdict=f"{len(rows) - off} of {len(rows)} are within 10% or 32 MiB of it.",
    )  # fmt: skip


def is_as_planned(highest: int, planned: int) -> bool:
    """Whether the most that was allocated is what the plan says, within 10% or 32 MiB."""
    return abs(highest - planned) <= max(planned / 10, 32 * MIB)


if __name__ == "__main__":
    import memory_moments  # by its name: what ranks are sent is found by it

    print(memory_moments.write_page())
