"""One thing that was to be proven, and the page of all."""

import getpass
import importlib.metadata
import os
import platform
import re
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from minimind.accelerator import compute_capability, count_devices, device_module, device_name, toolkit
from minimind.files import ROOT, replace_file, write_json
from minimind.units import format_bytes, format_duration

FORMAT_VERSION = 1
SIGNS = {"passed": "passed ", "failed": "FAILED ", "skipped": "skipped"}


@dataclass(frozen=True)
class Finding:
    """It passed if no figure exceeds its bound."""

    name: str
    status: Literal["passed", "failed", "skipped"]
    figures: Mapping[str, float] = field(default_factory=dict)
    bounds: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    """What was run, or why it was not, or how it failed."""

    def __str__(self) -> str:
        return f"{SIGNS[self.status]}  {'; '.join(filter(None, (self.words(), self.note)))}"

    def words(self) -> str:
        """The figures, each with its bound."""
        bounds = {name: f" (at most {_figure(name, bound)})" for name, bound in self.bounds.items()}
        return ", ".join(
            f"{name.replace('_', ' ')} {_figure(name, figure)}{bounds.get(name, '')}"
            for name, figure in self.figures.items()
        )


def _figure(name: str, value: float) -> str:
    if name.endswith("_bytes"):
        return format_bytes(value)
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.2g}"


def without_names(text: str) -> str:
    """The text without folders, the host's name and the user's."""
    text = re.sub(r"(?<![\w.])~?/(?:[^\s/:;,'\"()]+/)*", "", text)
    for name, word in ((socket.gethostname(), "HOST"), (getpass.getuser(), "USER"), (Path.home().name, "USER")):
        text = re.sub(rf"\b{re.escape(name)}\b", word, text) if name else text
    return text


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What a finding depends on; no names of hosts, persons or folders."""
    is_cpu = device.type == "cpu"
    memory = psutil.virtual_memory().total
    return {
        "os": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "device": cpu_name() if is_cpu else device_name(device),
        "device_type": device.type,
        "devices": count_devices(),
        "device_memory_bytes": memory if is_cpu else _told(lambda: device_module(device).mem_get_info(device)[1]),
        "driver": None if is_cpu else _told(lambda: driver_version(device)),
        "built_for": toolkit(),
        "simulated": any(name.startswith("SIMULATED_") for name in os.environ),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "deepspeed")},
        "minimind": _first_line("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
    }


def cpu_name() -> str:
    """The processor as its system calls it, with family and model, as virtual machines shorten the name; and the vector
    instructions that torch takes."""
    fields: dict[str, str] = {}
    if platform.system() == "Darwin":
        fields["model name"] = _first_line("sysctl", "-n", "machdep.cpu.brand_string") or ""
    elif (cpuinfo := Path("/proc/cpuinfo")).exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    known = ("cpu family", "model", "CPU implementer", "CPU part")
    more = [f"{key.removeprefix('cpu ')} {fields[key]}" for key in known if key in fields]
    return ", ".join([name, *more, torch.backends.cpu.get_cpu_capability()])


def driver_version(device: torch.device) -> str | None:
    """Of the accelerator, as far as it tells one."""
    if compute_capability(device) is not None:
        return _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    properties = getattr(device_module(device), "get_device_properties", lambda _: None)(device)
    return getattr(properties, "driver_version", None)


def _told(ask: Callable[[], Any]) -> Any:
    """What a device tells of itself, if it does."""
    try:
        return ask()
    except Exception:  # as many ways as libraries
        return None


def _first_line(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip().partition("\n")[0] or None


def write_proof(
    folder: Path, machine: Mapping[str, Any], findings: Sequence[Finding], date: str, seconds: float
) -> None:
    """Write `prove.json` and `prove.md`, each whole or not at all."""
    content = {"format_version": FORMAT_VERSION, "date": date, "seconds": round(seconds), "machine": dict(machine)}
    checks = [asdict(finding) for finding in findings]
    write_json(folder / "prove.json", {**content, "checks": checks})
    counts = ", ".join(f"{sum(one.status == status for one in findings)} {status}" for status in SIGNS)
    lines = [f"# MiniMind on {machine['device']}", "", f"{date}, {format_duration(seconds)}: {counts}.", ""]
    if machine["simulated"]:
        lines += ["**A rehearsal on a simulated device: nothing below was measured on one.**", ""]
    lines += ["| Check | | Figures | |", "|---|---|---|---|"]
    lines += [_row(one.name, one.status, one.words(), one.note) for one in findings]
    lines += ["", "| Machine | |", "|---|---|"]
    lines += [
        _row(name.removesuffix("_bytes").replace("_", " "), format_bytes(value) if name.endswith("_bytes") else value)
        for name, value in machine.items()
        if value is not None
    ]
    replace_file(folder / "prove.md", "\n".join(lines) + "\n")


def _row(*cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
