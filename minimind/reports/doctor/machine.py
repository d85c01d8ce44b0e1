"""The doctor's look at the machine: launchers, limits, shared memory, memory, disk. Only reads."""

import os
import resource
import shutil
import sys
from pathlib import Path

from minimind.reports.doctor.finding import Finding
from minimind.units import format_bytes

SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_MEMORY = 2**30
LEAST_OPEN_FILES = 4096
LEAST_MEMORY = 4 * 2**30
LEAST_DISK = 10 * 2**30
TIGHT_DISK = 2**30

_LAUNCHERS = {
    "deepspeed": "several GPUs or nodes through the deepspeed launcher; it comes with pip install deepspeed",
    "srun": "SLURM clusters",
    "mpirun": "MPI clusters",
    "pdsh": "the deepspeed launcher over several nodes",
    "ssh": "the deepspeed launcher over several nodes",
}


def check_launchers() -> list[Finding]:
    """Which launchers are here; one that is not is no fault."""
    found = []
    for name, use in _LAUNCHERS.items():
        path = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
        found.append(Finding(name, "ok", path or f"not found; only needed for {use}"))
    return found


def check_machine(run_dir: Path) -> list[Finding]:
    """Limits, shared memory, memory and disk."""
    return [check_open_files(), check_locked_memory(), *check_shared_memory(), check_memory(), check_disk(run_dir)]


def check_open_files() -> Finding:
    """Every shard, socket and worker is an open file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = _show_limit(soft)
    if soft != resource.RLIM_INFINITY and soft < LEAST_OPEN_FILES:
        return Finding("open files", "warn", shown, f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}")
    return Finding("open files", "ok", shown)


def check_locked_memory() -> Finding:
    """RDMA networks and pinned memory need it."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    shown = "unlimited" if soft == resource.RLIM_INFINITY else format_bytes(soft)
    has_rdma = Path("/sys/class/infiniband").is_dir() and any(Path("/sys/class/infiniband").iterdir())
    if has_rdma and soft != resource.RLIM_INFINITY:
        return Finding("locked memory", "warn", shown, "ulimit -l unlimited, or NCCL cannot use the RDMA network")
    return Finding("locked memory", "ok", shown)


def check_shared_memory(folder: Path = SHARED_MEMORY) -> list[Finding]:
    """NCCL and gloo pass data of one host through it; killed runs leave buffers in it."""
    if not folder.is_dir():
        return [Finding("shared memory", "bad", f"no {folder}", "mount it: mount -t tmpfs tmpfs /dev/shm")]
    usage = shutil.disk_usage(folder)
    what = f"{format_bytes(usage.free)} free of {format_bytes(usage.total)} in {folder}"
    if usage.total < LEAST_SHARED_MEMORY:
        finding = Finding("shared memory", "warn", what, "start the container with --shm-size=8g, or --ipc=host")
    elif usage.free < usage.total / 10:
        finding = Finding("shared memory", "warn", what, f"remove what nobody uses from {folder}")
    else:
        finding = Finding("shared memory", "ok", what)
    left = sorted(folder.glob("deepspeed_allreduce_buffer_*"))
    if not left:
        return [finding]
    size = format_bytes(sum(path.stat().st_size for path in left))
    cure = f"when no run is going: rm {folder}/deepspeed_allreduce_buffer_*"
    return [finding, Finding("left buffers", "warn", f"{len(left)} of killed runs, {size}", cure)]


def check_memory() -> Finding:
    """Host memory, as far as it is free."""
    text = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else ""
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in text.splitlines() if line.strip()}
    if "MemAvailable" not in values:
        return Finding("memory", "ok", "not told by this system")
    what = f"{format_bytes(values['MemAvailable'])} free of {format_bytes(values['MemTotal'])}"
    cores = len(os.sched_getaffinity(0))
    if values["MemAvailable"] < LEAST_MEMORY:
        return Finding("memory", "warn", what, "close other programs; even small runs need some gigabytes")
    return Finding("memory", "ok", f"{what}, {cores} cores")


def check_disk(run_dir: Path) -> Finding:
    """Room for checkpoints where the runs go, and whether one may write there."""
    folder = run_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    what = f"{format_bytes(free)} free at {folder}"
    if not os.access(folder, os.W_OK):
        return Finding("disk", "bad", f"{folder} cannot be written", "give a --run-dir of your own")
    if free < TIGHT_DISK:
        return Finding("disk", "bad", what, "a checkpoint will not fit; free space, or give another --run-dir")
    if free < LEAST_DISK:
        return Finding("disk", "warn", what, "python -m minimind.plan says how much a run's checkpoints need")
    return Finding("disk", "ok", what)


def _show_limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"
