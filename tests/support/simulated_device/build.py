"""The device in C++, built once for each state of its sources: a minute with g++."""

import fcntl
import hashlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
LIBRARY = "SIMULATED_DEVICE_LIBRARY"
"""Names the built library for the processes that a test starts, whatever they take for their cache."""


def has_compiler() -> bool:
    """Whether the device can be built here."""
    return shutil.which("g++") is not None


def build() -> Path:
    """The library, below the cache of extensions that tests use."""
    if LIBRARY in os.environ:
        return Path(os.environ[LIBRARY])
    import torch
    from torch.utils import cpp_extension

    text = b"".join(path.read_bytes() for path in sorted([*HERE.glob("*.h"), *HERE.glob("*.cpp")]))
    digest = hashlib.sha256(text + torch.__version__.encode() + sys.version.encode()).hexdigest()[:12]
    name = f"simulated_device_{digest}"
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()) / name
    library = folder / f"{name}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "building", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go when its process ends, however it ends
        if not library.exists():
            _compile(name, folder)
    os.environ[LIBRARY] = str(library)
    return library


def _compile(name: str, folder: Path) -> None:
    from torch.utils import cpp_extension

    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # ninja
    cpp_extension._write_ninja_file_and_build_library(
        name=name, sources=[str(HERE / "device.cpp")], extra_cflags=["-O1", "-std=c++20"], extra_cuda_cflags=[],
        extra_sycl_cflags=[], extra_ldflags=[], extra_include_paths=[], build_directory=str(folder),
        verbose=False, with_cuda=False, with_sycl=False,
    )  # fmt: skip


def load() -> ModuleType:
    """The built module."""
    library = build()
    spec = importlib.util.spec_from_file_location(library.stem, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
