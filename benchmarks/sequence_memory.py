"""Peak memory of a rank that shares long sequences or layers with others, measured on a CPU beside what the plan says.

    python benchmarks/sequence_memory.py [--model minimind3] [--seq-len 32768] [--sp-sizes 1 2 4] [--tp-sizes 2]

One window a step, documents masked, blocks recomputed, float32, ZeRO 1. The first step is of a short window: it makes
the optimizer's states; the second is measured.
"""

import multiprocessing
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from harness import ROOT

from minimind.checkpoints.manifest import TrainState
from minimind.config.deepspeed_file import load_ds_config
from minimind.config.resolve import resolve_run
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import DataConfig, RunConfig, TrainConfig, preset
from minimind.data.dataset import TokenDataset
from minimind.data.shards import open_split
from minimind.distributed.environment import read_environment
from minimind.distributed.process_group import process_group
from minimind.reports.plan import trial
from minimind.reports.plan.memory import estimate_memory
from minimind.training.setup import make_loader
from minimind.units import format_bytes

CPU = torch.device("cpu")
SHORT = 256


@dataclass(frozen=True)
class Measurement:
    """What is measured."""

    model: str = "minimind3"
    seq_len: int = 32768
    sp_sizes: tuple[int, ...] = (1, 2, 4)
    tp_sizes: tuple[int, ...] = (2,)
    port: int = 29611


def resolve(given: Measurement, sp_size: int, tp_size: int) -> ResolvedRun:
    """The run, with one window a step."""
    run = RunConfig(
        preset(given.model),
        DataConfig(seq_len=given.seq_len, document_mask=True),
        TrainConfig(
            sp_size=sp_size, tp_size=tp_size, micro_batch_size=1, global_batch_size=1, precision="fp32",
            optimizer="adamw", activation_checkpointing=True, steps=10,
        ),
    )  # fmt: skip
    return resolve_run(run, load_ds_config(str(ROOT / "ds_configs" / "zero1.json")), world_size=sp_size * tp_size)


def measure(rank: int, given: Measurement, sp_size: int, tp_size: int, found: Any) -> None:
    """One rank: bytes beyond what the process held before the model, at the peak of a step."""
    size = str(sp_size * tp_size)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size,
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(given.port),
    )  # fmt: skip
    torch.set_num_threads(1)
    resolved, env = resolve(given, sp_size, tp_size), read_environment()
    trial.return_freed_memory()
    with process_group(env, CPU), tempfile.TemporaryDirectory() as folder:
        base = trial.held_bytes(CPU)
        trainer = trial.make_trainer(resolved, env, CPU, Path(folder))
        short = TokenDataset(open_split(Path(folder), "train"), SHORT, document_mask=True)
        loader = make_loader(resolved, short, trainer.mesh, TrainState(), pin_memory=False)
        trainer.train_step(loader.step_batches(0))
        trial.reset_peak(CPU)
        trainer.train_step(trainer.loader.step_batches(0))
        found.put(trial.peak_bytes(CPU) - base)
        trainer.engine.destroy()


def main(given: Measurement) -> None:
    """Print a line for each size."""
    for sp_size, tp_size in [*((size, 1) for size in given.sp_sizes), *((1, size) for size in given.tp_sizes)]:
        found = multiprocessing.get_context("spawn").SimpleQueue()
        ranks = sp_size * tp_size
        torch.multiprocessing.spawn(measure, (given, sp_size, tp_size, found), ranks)
        peaks = [found.get() for _ in range(ranks)]
        planned = estimate_memory(resolve(given, sp_size, tp_size), "cpu").total
        print(
            f"sp_size {sp_size} tp_size {tp_size}: measured {format_bytes(min(peaks))} to {format_bytes(max(peaks))} a "
            f"rank, planned {format_bytes(planned)} ({planned / max(peaks) - 1:+.0%})",
            flush=True,
        )


if __name__ == "__main__":
    main(tyro.cli(Measurement))
