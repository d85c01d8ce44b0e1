"""What the system tells a process about itself and its machine: Linux, and where that is silent, macOS's nearest."""

import contextlib
import os
import resource
import subprocess
import sys
from pathlib import Path

from minimind.errors import UserError

PROC = Path("/proc")


def count_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> int:
    """Most bytes of memory that this process has held, since `forget_peak` where the system can forget."""
    try:
        return int((PROC / "self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """Begin the peak anew, on Linux; elsewhere it stays that of the process."""
    with contextlib.suppress(OSError):
        (PROC / "self/clear_refs").write_text("5")


def boot_id() -> str:
    """Identifies this machine since it was started (two may have one name); "" where the system does not tell."""
    with contextlib.suppress(OSError):
        return (PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = ["sysctl", "-n", "kern.bootsessionuuid"]
        return subprocess.check_output(asked, stderr=subprocess.DEVNULL, text=True).strip()
    return ""


def require_linux(what: str, instead: str) -> None:
    """Refuse what no other system has.

    Raises:
        UserError: this is not Linux.
    """
    if sys.platform != "linux":
        raise UserError(f"{what}: Linux alone has it, and this is {sys.platform}; {instead}")
