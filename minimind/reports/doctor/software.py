"""Checks of the software: versions, the accelerator, DeepSpeed's ops and what builds them, communication.

What may be broken is imported only inside a check, and a failure becomes its result.
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

from minimind.accelerator import (
    collectives_of,
    compute_capability,
    computes_bf16,
    count_devices,
    default_device,
    device_module,
    device_name,
    toolkit,
)
from minimind.errors import first_line
from minimind.files import ROOT
from minimind.model.kernels.matmul import has_fast_matmul
from minimind.parallel.compilation import find_missing_compiler
from minimind.reports.doctor.check import Check, Status
from minimind.reports.doctor.machine import find_program
from minimind.units import format_bytes

REQUIREMENTS = ROOT / "requirements.txt"
_NEEDED_OPS = {
    "cpu_adam": ("offload of the optimizer", "a C++ compiler"),
    "async_io": ("offload to NVMe", "libaio-dev"),
}
"""Ops that a shipped configuration needs: what for, and what to install."""
_STALE_SECONDS = 1800.0
"""No build takes longer than this."""


def check_versions() -> list[Check]:
    """Python, and every package of requirements.txt."""
    fits = (3, 10) <= sys.version_info[:2] <= (3, 12)
    fix = "" if fits else "use Python 3.10 to 3.12"
    found = [Check("python", "ok" if fits else "bad", sys.version.split()[0], fix)]
    text = REQUIREMENTS.read_text(encoding="utf-8") if REQUIREMENTS.exists() else "torch\ndeepspeed\nnumpy"
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return found + [check_package(Requirement(line)) for line in lines if line and not line.startswith("-")]


def check_package(requirement: Requirement) -> Check:
    """Whether a package is installed, in a version that fits."""
    name, fix = requirement.name, f'pip install "{requirement}"'
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "bad", "not installed", fix)
    if requirement.specifier.contains(version.split("+")[0], prereleases=True):
        return Check(name, "ok", version)
    # An older torch may work on GPU machines; checkpoints depend on DeepSpeed's exact version.
    status: Status = "bad" if name == "deepspeed" else "warn"
    return Check(name, status, f"{version} instead of {requirement.specifier}", fix)


def check_accelerator() -> list[Check]:
    """The accelerators, or why there are none."""
    if count_devices():
        return [describe_accelerator(i, torch.device(default_device().type, i)) for i in range(count_devices())]
    if shutil.which("nvidia-smi") is None:
        precisions = "bf16 and fp32" if has_fast_matmul(torch.bfloat16) else "fp32; bf16 is computed in it"
        return [Check("GPU", "ok", f"none; training runs on the CPU ({precisions})")]
    if torch.version.cuda is None:
        fix = "install torch's CUDA build (https://pytorch.org/get-started/locally)"
        return [Check("GPU", "bad", f"a driver is here, but torch {torch.__version__} is built without CUDA", fix)]
    fix = "see nvidia-smi; the driver may be too old for it, or CUDA_VISIBLE_DEVICES empty"
    return [Check("GPU", "bad", f"torch is built for CUDA {torch.version.cuda}, and finds no device", fix)]


def describe_accelerator(number: int, device: torch.device) -> Check:
    """One accelerator that torch can use."""
    total = device_module(device).mem_get_info(device)[1]
    bf16 = "bf16" if computes_bf16(device) else "no bf16: train in fp16"
    return Check(f"GPU {number}", "ok", f"{device_name(device)}, {format_bytes(total)}, {bf16}, {toolkit()}")


def check_ops(build: Sequence[str]) -> list[Check]:
    """Build tools, which of DeepSpeed's ops this machine can build, locks of killed builds; builds the ops `build`."""
    compiler = os.environ.get("CXX", "c++")
    found = [
        check_tool(
            "C++ compiler",
            compiler,
            "install one (apt-get install g++); offload needs it",
        ),
        check_tool("ninja", "ninja", "pip install ninja; only offload needs it"),
    ]
    if compute_capability(default_device()) is not None:
        home = importlib.import_module("torch.utils.cpp_extension").CUDA_HOME
        fix = "install the CUDA toolkit and set CUDA_HOME; only DeepSpeed's own GPU ops need it"
        found.append(check_tool("nvcc", "nvcc", fix, *([f"{home}/bin"] if home else [])))
        missing = find_missing_compiler(default_device().type)
        kernels = Check("kernels", "ok", "Triton can compile them")
        if missing is not None:
            kernels = Check("kernels", "warn", f"{missing} is missing", "install it: experts and --compile need it")
        found.append(kernels)
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    found += check_locks(Path(named) if named else Path.home() / ".cache" / "torch_extensions")
    try:
        builders: dict[str, Any] = importlib.import_module("deepspeed.ops.op_builder.all_ops").ALL_OPS
    except Exception as error:  # whatever breaks its import is the result
        return [*found, Check("deepspeed", "bad", f"cannot be imported: {first_line(error)}", "pip install it anew")]
    able = [name for name, builder in sorted(builders.items()) if _is_compatible(builder)]
    found.append(Check("can build", "ok", ", ".join(able) or "none"))
    for name, (use, package) in _NEEDED_OPS.items():
        if name in builders and name not in able:
            found.append(Check(name, "warn", f"cannot be built; {use} needs it", f"install {package}"))
    return found + [build_op(name, builders) for name in build]


def check_tool(name: str, program: str, fix: str, *folders: str) -> Check:
    """Whether a build tool is installed, with the first line of its --version."""
    path = find_program(program, *folders)
    if path is None:
        return Check(name, "warn", f"{program} not found", fix)
    result = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=30)
    return Check(name, "ok", (result.stdout.strip().splitlines() or [path])[0])


def check_locks(folder: Path) -> list[Check]:
    """Lock files of builds: with the one of a killed build, every later run waits without end or message."""
    found = []
    for path in sorted(path for path in folder.rglob("lock") if path.is_file()):
        age = time.time() - path.stat().st_mtime
        stale = age > _STALE_SECONDS
        fix = f"{'left by a killed build' if stale else 'if nothing is being built now'}: rm {path}"
        found.append(Check("build locks", "bad" if stale else "warn", f"{path}, {age / 60:.0f} minutes old", fix))
    return found or [Check("build locks", "ok", f"none in {folder}")]


def build_op(name: str, builders: dict[str, Any]) -> Check:
    """Compile an op and load it."""
    if name not in builders:
        return Check(name, "bad", "DeepSpeed has no op of this name", f"one of {', '.join(sorted(builders))}")
    began = time.monotonic()
    try:
        builders[name].load(verbose=False)
    except Exception as error:  # compilers fail in many ways
        return Check(name, "bad", f"does not build: {first_line(error)}", "see the compiler's output above")
    return Check(name, "ok", f"built and loaded in {time.monotonic() - began:.0f} s")


def check_communication() -> list[Check]:
    """gloo and the accelerator's own library, each in a group of one rank that sums a tensor."""
    found = [check_backend("gloo", torch.device("cpu"))]
    device = default_device()
    own = collectives_of(device)
    if own != "gloo" and torch.distributed.is_backend_available(own):
        found.append(check_backend(own, torch.device(device.type, 0)))
    elif own != "gloo":
        found.append(Check(own, "bad", "not in this torch", f"install torch's build for {device.type} and Linux"))
    return found


def check_backend(backend: str, device: torch.device) -> Check:
    """Make a group of this process alone and reduce over it."""
    if torch.distributed.is_initialized():
        return Check(backend, "ok", "in use by this process")
    try:
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
        tensor = torch.ones(8, device=device)
        torch.distributed.all_reduce(tensor)
        works = bool((tensor == 1).all())
    except Exception as error:  # libraries and networks fail in many ways
        return Check(backend, "bad", f"does not work: {first_line(error)}", "see NCCL_DEBUG=INFO, GLOO_SOCKET_IFNAME")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return Check(backend, "ok" if works else "bad", "works" if works else "reduces wrongly")


def _is_compatible(builder: Any) -> bool:
    try:
        return bool(builder.is_compatible(verbose=False))
    except Exception:  # a builder that raises cannot build here
        return False
