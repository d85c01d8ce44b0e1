"""The largest micro-batch that fits the present device, by real steps in child processes.

Each try is `minimind.reports.plan.trial` in a child, so that running out of memory ends only the child. The next size
follows from the peaks of the earlier ones, so the search stops below the limit instead of running into it.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from minimind.accelerator import computes_bf16, count_devices, default_device, device_module
from minimind.config.deepspeed_keys import without_batch
from minimind.config.resolve import resolve_run
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import RunConfig
from minimind.errors import UserError
from minimind.reports.plan import trial
from minimind.reports.plan.memory import estimate_memory
from minimind.units import format_bytes

USABLE_DEVICE = 0.95
USABLE_HOST = 0.8
"""Share of the memory that is free now; the rest is left to the machine's other processes."""
TRY_SECONDS = 900
LARGEST = 4096
_OF_A_LAUNCHER = ("MASTER_", "TORCHELASTIC_", "SLURM_", "OMPI_", "PMI")


def find_micro_batch(run: RunConfig, ds: dict[str, Any], limit: int | None, *, num_ranks: int = 1) -> int:
    """Try larger and larger micro-batches on the present device and print a line for each; gives the largest that fits.

    Args:
        limit: bytes that a rank may hold; None: what the device, or the host, has free now.
        num_ranks: ranks to try with, as far as there are devices; one on a CPU.

    Raises:
        UserError: not even one sequence fits, or a try failed for another reason than memory.
    """
    device = default_device()
    ranks = min(num_ranks, max(1, count_devices()))
    if limit is None:
        limit = round(free_memory() * USABLE_HOST) if device.type == "cpu" else _device_limit(device)
    print(f"limit     {format_bytes(limit)} a rank; {ranks} rank{'s' if ranks > 1 else ''} on this device", flush=True)

    def attempt(micro: int) -> int | None:
        resolved = _resolve(run, ds, micro, ranks, device)
        finding = try_steps(resolved, ranks, limit)
        if finding is None:
            print(f"{micro:>6}    more than {format_bytes(limit)}", flush=True)
            return None
        tokens = resolved.train.global_batch_size * run.data.seq_len
        speed = tokens / finding["step_seconds"]
        print(f"{micro:>6}    {format_bytes(finding['peak_bytes'])}, {speed:,.0f} tokens/s", flush=True)
        return int(finding["peak_bytes"])

    largest = search(attempt, limit)
    if not largest:
        raise _nothing_fits(run, limit)
    print(f"largest   --micro-batch-size {largest}", flush=True)
    return largest


def fit_micro_batch(resolved: ResolvedRun, ranks: int) -> tuple[int, str]:
    """The largest micro-batch of a run that fits its GPUs, of those that divide a rank's share of the global batch, and
    that in words. The first try is the largest that the plan expects to fit.

    Args:
        resolved: the run, with any micro-batch.
        ranks: ranks to try with.

    Raises:
        UserError: as in `find_micro_batch`.
    """
    device = default_device()
    limit = _device_limit(device)
    share = resolved.train.global_batch_size // resolved.dp_size
    tried: dict[int, bool] = {}

    def settle(micro: int) -> ResolvedRun:
        train = dataclasses.replace(resolved.run.train, gradient_accumulation_steps=share // micro)
        return _resolve(dataclasses.replace(resolved.run, train=train), resolved.ds, micro, ranks, device)

    def fits(micro: int) -> bool:
        if micro not in tried:
            tried[micro] = try_steps(settle(micro), ranks, limit) is not None
        return tried[micro]

    sizes = [size for size in range(1, min(share, LARGEST) + 1) if share % size == 0]
    largest = max((size for size in sizes if estimate_memory(settle(size), device.type).total <= limit), default=1)
    while not fits(largest) and largest > 1:
        largest = max(size for size in sizes if size < largest)
    while (larger := [size for size in sizes if size > largest]) and fits(larger[0]):
        largest = larger[0]
    if not tried[largest]:
        raise _nothing_fits(resolved.run, limit)
    found = ", ".join(f"{size} {'fits' if tried[size] else 'does not'}" for size in sorted(tried))
    return largest, f"{largest} of a rank's {share} sequences a step: {found} in {format_bytes(limit)}"


def _nothing_fits(run: RunConfig, limit: int) -> UserError:
    return UserError(
        f"micro_batch_size: not even 1 sequence of {run.data.seq_len} tokens fits {format_bytes(limit)}; shorten "
        "--seq-len, take a higher ZeRO stage, or --activation-checkpointing"
    )


def search(attempt: Callable[[int], int | None], limit: int, largest: int = LARGEST) -> int:
    """The largest size whose peak stays below `limit`; `attempt` gives the peak, or None where it did not fit.

    Memory grows in a straight line with the size: after two tries the next is where that line meets the limit.
    """
    peaks: dict[int, int] = {}
    ceiling = largest + 1
    size = 1
    while size < ceiling and size not in peaks:
        peak = attempt(size)
        if peak is None or peak > limit:
            ceiling = size
        else:
            peaks[size] = peak
        size = _next_size(peaks, ceiling, limit)
    return max(peaks, default=0)


def _next_size(peaks: dict[int, int], ceiling: int, limit: int) -> int:
    if not peaks:
        return ceiling
    *_, low = sorted(peaks)
    if len(peaks) < 2:
        return min(2 * low, ceiling - 1)
    before = sorted(peaks)[-2]
    slope = (peaks[low] - peaks[before]) / (low - before)
    reach = low + int((limit - peaks[low]) / slope) if slope > 0 else 4 * low
    # A line through the smallest sizes is a rough one: not further than fourfold at once.
    return max(low, min(reach, 4 * low, ceiling - 1))


def _device_limit(device: torch.device) -> int:
    return round(device_module(device).mem_get_info(device)[0] * USABLE_DEVICE)


def _resolve(run: RunConfig, ds: dict[str, Any], micro: int, ranks: int, device: torch.device) -> ResolvedRun:
    """The run with this micro-batch; accumulation over two where it accumulates at all."""
    ds, theirs = without_batch(ds)
    accumulation = min(2, run.train.gradient_accumulation_steps or theirs or 1)
    train = dataclasses.replace(
        run.train, micro_batch_size=micro, global_batch_size=None, gradient_accumulation_steps=accumulation
    )
    return resolve_run(
        dataclasses.replace(run, train=train),
        ds,
        world_size=ranks,
        num_samples=1_000_000,
        local_world_size=ranks,
        device_type=device.type,
        bf16_supported=computes_bf16(device),
    )


def try_steps(resolved: ResolvedRun, ranks: int, limit: int | None) -> dict[str, Any] | None:
    """What `minimind.reports.plan.trial` finds of the run, or None where it needs more than `limit` bytes.

    Raises:
        UserError: the trial failed otherwise; with the last line that it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        order = Path(folder) / "order.json"
        order.write_text(json.dumps({"run": resolved.run.to_dict(), "ds": resolved.ds, "limit_bytes": limit}))
        command = [sys.executable, "-m", "minimind.distributed.launchers.local", str(ranks), "-m", trial.__name__]
        # This process may be a rank itself, of a run whose port is not the trial's.
        env = {name: value for name, value in os.environ.items() if not name.startswith(_OF_A_LAUNCHER)}
        try:
            result = subprocess.run(
                [*command, str(order)], capture_output=True, text=True, check=False, timeout=TRY_SECONDS, env=env
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"the trial took more than {TRY_SECONDS} s, and was ended") from None
    if trial.TOO_LARGE in result.stderr or result.returncode == 128 + signal.SIGKILL:
        return None
    if result.returncode:
        said = [line for line in result.stderr.splitlines() if line.strip()] or ["nothing was said"]
        raise UserError(f"the trial failed: {said[-1].removeprefix('error: ')}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def free_memory() -> int:
    """Bytes that this host, and the control group of this process, can still give."""
    free, group = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    try:
        return min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no control group, or "max"
        return free
