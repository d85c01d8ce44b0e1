"""The doctor's look at the software: versions, the accelerator, DeepSpeed's ops and what builds them, communication.

Imports what may be broken only while it looks, and turns each failure into a finding.
"""

import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from minimind.errors import first_line
from minimind.files import ROOT
from minimind.model.kernels.matmul import multiplies
from minimind.reports.doctor.finding import Finding, Verdict
from minimind.units import format_bytes

REQUIREMENTS = ROOT / "requirements.txt"
PYTHONS = ((3, 10), (3, 12))
NEEDED_OPS = {"cpu_adam": "offload of the optimizer", "async_io": "offload to NVMe"}
"""The ops that a shipped configuration needs, and for what."""
STALE_SECONDS = 1800.0
"""No build takes longer than this."""


def check_versions() -> list[Finding]:
    """Python, and every package of requirements.txt against what is asked of it."""
    low, high = PYTHONS
    version = sys.version.split()[0]
    fits = low <= sys.version_info[:2] <= high
    cure = "" if fits else f"use Python {low[0]}.{low[1]} to {high[0]}.{high[1]}"
    found = [Finding("python", "ok" if fits else "bad", version, cure)]
    if not REQUIREMENTS.exists():
        return [*found, *(check_package(Requirement(name)) for name in ("torch", "deepspeed", "numpy"))]
    lines = (line.split("#")[0].strip() for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines())
    return found + [check_package(Requirement(line)) for line in lines if line and not line.startswith("-")]


def check_package(requirement: Requirement) -> Finding:
    """Whether a package is installed, in a version that fits."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(requirement.name, "bad", "not installed", f'pip install "{requirement}"')
    if requirement.specifier.contains(version.split("+")[0], prereleases=True):
        return Finding(requirement.name, "ok", version)
    # torch on GPU machines may be an older one that works; what the checkpoints depend on may not.
    verdict: Verdict = "bad" if requirement.name == "deepspeed" else "warn"
    return Finding(
        requirement.name, verdict, f"{version} instead of {requirement.specifier}", f'pip install "{requirement}"'
    )


def check_accelerator() -> list[Finding]:
    """CUDA devices, or why there are none."""
    if torch.cuda.is_available():
        found = []
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: train in fp16"
            what = f"{properties.name}, {format_bytes(properties.total_memory)}, {bf16}, CUDA {torch.version.cuda}"
            found.append(Finding(f"GPU {index}", "ok", what))
        return found
    if shutil.which("nvidia-smi") is None:
        arithmetic = "bf16 and fp32" if multiplies(torch.bfloat16) else "fp32; bf16 is computed in it"
        return [Finding("GPU", "ok", f"none; training runs on the CPU ({arithmetic})")]
    if torch.version.cuda is None:
        cure = "install torch's CUDA build (https://pytorch.org/get-started/locally)"
        return [Finding("GPU", "bad", f"a driver is here, but torch {torch.__version__} is built without CUDA", cure)]
    cure = "see nvidia-smi; the driver may be too old for it, or CUDA_VISIBLE_DEVICES empty"
    return [Finding("GPU", "bad", f"torch is built for CUDA {torch.version.cuda}, and finds no device", cure)]


def check_ops(build: Sequence[str]) -> list[Finding]:
    """Compiler and ninja, which of DeepSpeed's ops this machine can build, builds that were killed; builds `build`."""
    found = [check_compiler(), check_ninja()]
    if torch.cuda.is_available():
        found.append(check_nvcc())
    found += check_locks(extensions_folder())
    try:
        builders: dict[str, Any] = importlib.import_module("deepspeed.ops.op_builder.all_ops").ALL_OPS
    except Exception as error:  # whatever keeps it from being imported is the finding
        return [*found, Finding("deepspeed", "bad", f"cannot be imported: {first_line(error)}", "pip install it anew")]
    able = {name: _is_compatible(builder) for name, builder in sorted(builders.items())}
    found.append(Finding("can build", "ok", ", ".join(name for name, fits in able.items() if fits) or "none"))
    for name, use in NEEDED_OPS.items():
        if name in able and not able[name]:
            need = "libaio-dev" if name == "async_io" else "a C++ compiler"
            found.append(Finding(name, "warn", f"cannot be built; {use} needs it", f"install {need}"))
    return found + [build_op(name, builders) for name in build]


def build_op(name: str, builders: dict[str, Any]) -> Finding:
    """Compile an op and load it."""
    if name not in builders:
        return Finding(name, "bad", "DeepSpeed has no op of this name", f"one of {', '.join(sorted(builders))}")
    began = time.monotonic()
    try:
        builders[name].load(verbose=False)
    except Exception as error:  # compilers fail in many ways
        return Finding(name, "bad", f"does not build: {first_line(error)}", "see the compiler's own words above")
    return Finding(name, "ok", f"built and loaded in {time.monotonic() - began:.0f} s")


def check_compiler() -> Finding:
    """The C++ compiler that torch would call."""
    name = os.environ.get("CXX", "c++")
    path = shutil.which(name)
    if path is None:
        cure = "install one (apt-get install g++); only offload needs it"
        return Finding("C++ compiler", "warn", f"no {name}", cure)
    return Finding("C++ compiler", "ok", _first_output([path, "--version"]) or path)


def check_ninja() -> Finding:
    """ninja, on the path or beside this Python."""
    path = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if path is None:
        return Finding("ninja", "warn", "not found", "pip install ninja; only offload needs it")
    return Finding("ninja", "ok", _first_output([path, "--version"]) or path)


def check_nvcc() -> Finding:
    """CUDA's compiler, which DeepSpeed's GPU ops need."""
    home = importlib.import_module("torch.utils.cpp_extension").CUDA_HOME
    path = shutil.which("nvcc") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)
    if path is None:
        cure = "install the CUDA toolkit and set CUDA_HOME; only DeepSpeed's own GPU ops need it"
        return Finding("nvcc", "warn", "not found", cure)
    return Finding("nvcc", "ok", path)


def extensions_folder() -> Path:
    """Where torch keeps the ops that it has built."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(named) if named else Path.home() / ".cache" / "torch_extensions"


def check_locks(folder: Path) -> list[Finding]:
    """Locks of builds: one that a killed build has left makes every later run wait for ever, without a word."""
    locks = sorted(path for path in folder.rglob("lock") if path.is_file()) if folder.is_dir() else []
    if not locks:
        return [Finding("build locks", "ok", f"none in {folder}")]
    found = []
    for path in locks:
        age = time.time() - path.stat().st_mtime
        what = f"{path}, {age / 60:.0f} minutes old"
        if age > STALE_SECONDS:
            found.append(Finding("build locks", "bad", what, f"left by a killed build: rm {path}"))
        else:
            found.append(Finding("build locks", "warn", what, f"if nothing is being built now: rm {path}"))
    return found


def check_communication() -> list[Finding]:
    """gloo and NCCL, each by a group of one rank that sums a tensor."""
    found = [check_backend("gloo", torch.device("cpu"))]
    if torch.cuda.is_available():
        if torch.distributed.is_nccl_available():
            found.append(check_backend("nccl", torch.device("cuda", 0)))
        else:
            found.append(Finding("nccl", "bad", "not in this torch", "install torch's CUDA build for Linux"))
    return found


def check_backend(backend: str, device: torch.device) -> Finding:
    """Make a group of this process alone and reduce over it."""
    if torch.distributed.is_initialized():
        return Finding(backend, "ok", "in use by this process")
    try:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        tensor = torch.ones(8, device=device)
        torch.distributed.all_reduce(tensor)
        works = bool((tensor == 1).all())
    except Exception as error:  # libraries and networks fail in many ways
        return Finding(backend, "bad", f"does not work: {first_line(error)}", "see NCCL_DEBUG=INFO, GLOO_SOCKET_IFNAME")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return Finding(backend, "ok" if works else "bad", "works" if works else "reduces wrongly")


def _is_compatible(builder: Any) -> bool:
    try:
        return bool(builder.is_compatible(verbose=False))
    except Exception:  # a builder that trips over this machine cannot build here
        return False


def _first_output(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return (result.stdout.strip().splitlines() or [""])[0]
