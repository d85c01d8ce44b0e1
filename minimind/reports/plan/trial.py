"""One try of a micro-batch: real optimizer steps on random tokens, and the memory that they hold.

    python -m minimind.reports.plan.trial ORDER       a JSON file: run, ds (both resolved), limit_bytes (or null)

Every rank builds the engine as training does, and rank 0 prints `peak_bytes` and `step_seconds` as JSON. A rank that
holds more than the limit (device memory on CUDA, resident memory beyond the start on a CPU) says `TOO_LARGE` and leaves
at once, before the machine runs out of memory. Saves nothing.
"""

import contextlib
import ctypes
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch

from minimind.accelerator import device_module, has_streams, synchronize
from minimind.checkpoints.manifest import TrainState
from minimind.checkpoints.run_state import DataFingerprint
from minimind.checkpoints.saving import CheckpointSaver
from minimind.config.resolve import resolve_run
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import RunConfig
from minimind.data.dataset import TokenDataset
from minimind.data.shard_writer import write_random_tokens
from minimind.data.shards import open_split
from minimind.distributed.environment import RankEnvironment, find_device, read_environment
from minimind.distributed.process_group import process_group
from minimind.distributed.stop_requests import StopRequests
from minimind.distributed.watchdog import Watchdog
from minimind.errors import UserError, run_main
from minimind.host import PROC, forget_peak, peak_memory
from minimind.parallel.engine import build_engine, build_model
from minimind.parallel.mesh import make_mesh
from minimind.training.control import RunControl
from minimind.training.objectives.pretrain import Pretrain
from minimind.training.profiler import StepProfiler
from minimind.training.record.metrics import NullRecord
from minimind.training.setup import make_loader
from minimind.training.trainer import Trainer

TOO_LARGE = "more than the limit"
STEPS = 3
SECONDS_BETWEEN_LOOKS = 0.01
_M_MMAP_THRESHOLD = -3


def main() -> int:
    """Take the order from its file and print the finding."""
    # The kernel, where memory is short all the same, is to take this process.
    with contextlib.suppress(OSError):
        (PROC / "self/oom_score_adj").write_text("1000")
    order = json.loads(Path(sys.argv[1]).read_text())
    env = read_environment()
    device = find_device(env)
    run = RunConfig.from_dict(order["run"])
    resolved = resolve_run(run, order["ds"], world_size=env.world_size, device_type=device.type)
    return_freed_memory()
    with process_group(env, device), tempfile.TemporaryDirectory() as folder:
        try:
            finding = take_steps(resolved, order["limit_bytes"], env, device, Path(folder))
        except torch.OutOfMemoryError:
            raise UserError(f"{TOO_LARGE}: rank {env.rank}, {device} is out of memory") from None
    if env.is_first:
        print(json.dumps(finding), flush=True)
    return 0


def take_steps(
    resolved: ResolvedRun, limit: int | None, env: RankEnvironment, device: torch.device, folder: Path
) -> dict[str, float]:
    """Build the engine and train for `STEPS` steps: `peak_bytes`, the most memory held during the last step beyond what
    the process had before the model, and `step_seconds` of the fastest. Every rank calls this."""
    base, seconds = held_bytes(device), []
    if limit is not None:
        give_up_beyond(base + limit, device)
    trainer = make_trainer(resolved, env, device, folder)
    for step in range(STEPS):
        if step == STEPS - 1:
            reset_peak(device)
        began = time.perf_counter()
        trainer.train_step(trainer.loader.step_batches(step))
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    finding = {"peak_bytes": peak_bytes(device) - base, "step_seconds": min(seconds)}
    trainer.engine.destroy()
    return finding


def make_trainer(resolved: ResolvedRun, env: RankEnvironment, device: torch.device, folder: Path) -> Trainer:
    """A trainer on random tokens that keeps no record and saves nothing. Every rank calls this."""
    tokens = resolved.data.seq_len * resolved.train.global_batch_size + 1
    dataset = TokenDataset(
        open_split(write_random_tokens(folder, resolved.model.vocab_size, tokens), "train"),
        resolved.data.seq_len,
        resolved.data.document_mask,
    )
    mesh = make_mesh(resolved)
    engine = build_engine(resolved, build_model(resolved, device, mesh), mesh)
    engine.train()
    return Trainer(
        resolved=resolved,
        mesh=mesh,
        engine=engine,
        objective=Pretrain(),
        loader=make_loader(resolved, dataset, mesh, TrainState(), pin_memory=has_streams(device)),
        val=None,
        saver=CheckpointSaver(engine, resolved, DataFingerprint("", ""), asynchronous=False),
        record=NullRecord(),
        control=RunControl(folder, StopRequests(None), Watchdog()),
        profiler=StepProfiler(folder, env.rank, 0, device),
        state=TrainState(),
    )


def return_freed_memory() -> None:
    """Let every large piece of memory go back when it is freed: else resident memory holds what the allocator keeps."""
    with contextlib.suppress(AttributeError, OSError):  # a C library without it
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**16)


def give_up_beyond(limit: int, device: torch.device) -> None:
    """From now on, leave the process as soon as it holds more than `limit` bytes."""
    if device.type != "cpu":
        # The allocator itself refuses, and torch raises.
        module = device_module(device)
        module.set_per_process_memory_fraction(min(1.0, limit / module.mem_get_info(device)[1]), device)
        return

    def watch() -> None:
        while held_bytes(device) <= limit:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os.write(2, f"{TOO_LARGE}: {limit} bytes resident\n".encode())
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def held_bytes(device: torch.device) -> int:
    """Memory that this process holds at this moment: allocated on an accelerator, resident on a CPU."""
    if device.type != "cpu":
        return int(device_module(device).memory_allocated(device))
    return psutil.Process().memory_info().rss


def reset_peak(device: torch.device) -> None:
    """Forget the peak so far."""
    if device.type != "cpu":
        device_module(device).reset_peak_memory_stats(device)
    else:
        forget_peak()


def peak_bytes(device: torch.device) -> int:
    """Most memory held since `reset_peak`."""
    if device.type != "cpu":
        return int(device_module(device).max_memory_allocated(device))
    return peak_memory()


if __name__ == "__main__":
    run_main(main)
