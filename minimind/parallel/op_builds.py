"""DeepSpeed's ops in C++ and CUDA that a run needs, compiled before its ranks meet, once on each host.

DeepSpeed would compile them when the optimizer is made, on every rank at once and without a word. A build that was
killed leaves torch's `lock` behind, for which every later one would wait without end.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import installed_ops
from deepspeed.ops.op_builder.builder import OpBuilder
from deepspeed.runtime import compiler
from torch.utils import cpp_extension

from minimind.config.resolved_run import ResolvedRun
from minimind.errors import UserError, first_line
from minimind.files import FolderLock
from minimind.host import require_linux

# DeepSpeed's engine imports its own Muon to ask whether it is the optimizer, and that puts torch.compile on it: the
# import of the compiler takes as long as torch's own, at every start of every run.
_compile, compiler.compile = compiler.compile, lambda: lambda function: function
import deepspeed.runtime.zero.muon.original_muon  # noqa: E402, F401

compiler.compile = _compile

PATIENCE_SECONDS = 5.0
"""Who waits longer for another process says so."""

LOOK_SECONDS = 2.0

_OPTIMIZER_OPS = {
    # type in the JSON: op of its update on the device, and on the host under offload
    "adam": ("FusedAdamBuilder", "CPUAdamBuilder"),
    "adamw": ("FusedAdamBuilder", "CPUAdamBuilder"),
    "adagrad": (None, "CPUAdagradBuilder"),
    "lion": ("FusedLionBuilder", "CPULionBuilder"),
    "lamb": ("FusedLambBuilder", "FusedLambBuilder"),
}


def needed_ops(resolved: ResolvedRun) -> list[str]:
    """Builders of the ops that the engine of this run loads, by DeepSpeed's names."""
    zero, ds = resolved.zero, resolved.ds
    names: list[str | None] = []
    if not resolved.owns_optimizer and not ds["optimizer"].get("params", {}).get("torch_adam"):
        on_device, on_host = _OPTIMIZER_OPS.get(ds["optimizer"]["type"].lower(), (None, None))
        names.append(on_device if zero.offload_optimizer is None else on_host)
    if "nvme" in (zero.offload_optimizer, zero.offload_param):
        require_linux("offload to nvme", 'take "device": "cpu"')
        names.append("GDSBuilder" if ds.get("aio", {}).get("use_gds") else "AsyncIOBuilder")
    section = ds.get("zero_optimization", {})
    if any(section.get(f"zero_quantized_{what}") for what in ("weights", "gradients", "nontrainable_weights")):
        names.append("QuantizerBuilder")
    if ds.get("compile", {}).get("deepcompile"):
        names.append("DeepCompileBuilder")
    return [name for name in names if name is not None]


def build_ops(resolved: ResolvedRun, say: Callable[[str], None]) -> None:
    """Compile what this run needs and this host has not, and load it. One process of a host at a time.

    Args:
        say: gets a line when something has to be compiled, or waited for.

    Raises:
        UserError: an op does not build here, with the compiler's last message.
    """
    for name in needed_ops(resolved):
        builder = get_accelerator().create_op_builder(name)
        if builder is not None and builder.name not in OpBuilder._loaded_ops:
            _build(builder, say)


def _build(builder: OpBuilder, say: Callable[[str], None]) -> None:
    name, folder = builder.name, Path(cpp_extension._get_build_directory(builder.name, verbose=False))
    with _held(folder, lambda: say(f"another process compiles DeepSpeed's {name} in {folder}: waiting for it")):
        if not (folder / f"{name}.so").exists() and not installed_ops.get(name):
            say(f"compiling DeepSpeed's {name}, once on this host; usually one to three minutes")
        try:
            builder.load(verbose=False)
        except (RuntimeError, ImportError, OSError, ValueError) as error:
            raise UserError(
                f"DeepSpeed's {name} does not build: {compiler_message(error)}; install a C++ compiler that knows "
                "OpenMP, and ninja (and the CUDA toolkit on a GPU), or choose a configuration that does not need it"
            ) from error


@contextlib.contextmanager
def _held(folder: Path, say_waiting: Callable[[], None]) -> Iterator[None]:
    """Keep other runs out of the folder of a build, and take away what a killed build has left there."""
    began, is_said, torch_lock = time.monotonic(), False, folder / "lock"
    lock: FolderLock | None = None
    while lock is None or (torch_lock.exists() and _is_compiling(folder)):  # the second by who does not know our lock
        with contextlib.suppress(BlockingIOError):
            lock = lock or FolderLock(folder)
        if not is_said and time.monotonic() - began > PATIENCE_SECONDS:
            say_waiting()
            is_said = True
        time.sleep(0.1)
    try:
        torch_lock.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def _is_compiling(folder: Path) -> bool:
    """Whether a process works in the folder, as ninja and the compilers of a build do; looks twice, as there is a
    moment before and after them."""
    for _ in range(2):
        time.sleep(LOOK_SECONDS)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.cwd() == str(folder):
                    return True
    return False


def compiler_message(error: BaseException) -> str:
    """The compiler's last error in what torch and DeepSpeed say of a failed build, or their first line."""
    text = "\n".join(str(one) for one in (error, error.__cause__) if one is not None)
    errors = re.findall(r"^.*\berror: .*$|^.*\bnot found\b.*$", text, re.MULTILINE)
    return (errors[-1].strip() if errors else first_line(error))[:300]
