"""Checks of the machine: launchers, limits, shared memory, memory, disk. They change nothing."""

import os
import resource
import shutil
import sys
from pathlib import Path

import psutil

from minimind.host import count_cores
from minimind.reports.doctor.check import Check
from minimind.units import format_bytes

SHARED_MEMORY = Path("/dev/shm")
_INFINIBAND = Path("/sys/class/infiniband")
_LAUNCHERS = {
    "deepspeed": "several GPUs or nodes through the deepspeed launcher; it comes with pip install deepspeed",
    "srun": "SLURM clusters",
    "mpirun": "MPI clusters",
    "pdsh": "the deepspeed launcher over several nodes",
    "ssh": "the deepspeed launcher over several nodes",
}


def find_program(name: str, *folders: str) -> str | None:
    """A program on the path, beside this Python, or in `folders`."""
    paths = (None, str(Path(sys.executable).parent), *folders)
    return next((found for path in paths if (found := shutil.which(name, path=path))), None)


def check_launchers() -> list[Check]:
    """The launchers of this machine; none of them is required."""
    return [
        Check(name, "ok", find_program(name) or f"not found; only needed for {use}") for name, use in _LAUNCHERS.items()
    ]


def check_machine(run_dir: Path) -> list[Check]:
    """Limits, shared memory, memory and disk."""
    return [*check_limits(), *check_shared_memory(SHARED_MEMORY), check_memory(), check_disk(run_dir)]


def check_limits() -> list[Check]:
    """Every shard and every connection is an open file, of which a run takes as many as the hard limit allows; RDMA
    networks lock memory."""
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    infinity = resource.RLIM_INFINITY
    fix = "raise the hard limit: ulimit -Hn 65536 as root" if files != infinity and files < 4096 else ""
    found = [Check("open files", "warn" if fix else "ok", "unlimited" if files == infinity else f"{files:,}", fix)]
    has_rdma = _INFINIBAND.is_dir() and any(_INFINIBAND.iterdir())
    fix = "ulimit -l unlimited, or NCCL cannot use the RDMA network" if locked != infinity and has_rdma else ""
    shown = "unlimited" if locked == infinity else format_bytes(locked)
    return [*found, Check("locked memory", "warn" if fix else "ok", shown, fix)]


def check_shared_memory(folder: Path) -> list[Check]:
    """NCCL and gloo pass data within a host through it; killed runs leave buffers in it."""
    if sys.platform != "linux":
        return []  # there they are pieces of memory without a folder
    if not folder.is_dir():
        return [Check("shared memory", "bad", f"no {folder}", "mount it: mount -t tmpfs tmpfs /dev/shm")]
    usage, fix = shutil.disk_usage(folder), ""
    if usage.total < 2**30:
        fix = "start the container with --shm-size=8g, or --ipc=host"
    elif usage.free < usage.total / 10:
        fix = f"remove unused files from {folder}"
    what = f"{format_bytes(usage.free)} free of {format_bytes(usage.total)} in {folder}"
    found = [Check("shared memory", "warn" if fix else "ok", what, fix)]
    if left := sorted(folder.glob("deepspeed_allreduce_buffer_*")):
        what = f"{len(left)} of killed runs, {format_bytes(sum(path.stat().st_size for path in left))}"
        fix = f"when nothing is running: rm {folder}/deepspeed_allreduce_buffer_*"
        found.append(Check("left buffers", "warn", what, fix))
    return found


def check_memory() -> Check:
    """Free memory of the host."""
    memory, cores = psutil.virtual_memory(), count_cores()
    what = f"{format_bytes(memory.available)} free of {format_bytes(memory.total)}, {cores} cores"
    fix = "close other programs; even small runs need some gigabytes" if memory.available < 4 * 2**30 else ""
    return Check("memory", "warn" if fix else "ok", what, fix)


def check_disk(run_dir: Path) -> Check:
    """Permission to write where the runs go, and room for checkpoints."""
    folder = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    if not os.access(folder, os.W_OK):
        return Check("disk", "bad", f"{folder} cannot be written", "give a --run-dir of your own")
    free = shutil.disk_usage(folder).free
    what = f"{format_bytes(free)} free at {folder}"
    if free < 2**30:
        return Check("disk", "bad", what, "a checkpoint will not fit; free space, or give another --run-dir")
    if free < 10 * 2**30:
        return Check("disk", "warn", what, "python -m minimind.plan says how much a run's checkpoints need")
    return Check("disk", "ok", what)
