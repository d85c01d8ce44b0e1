"""What a process on a CPU is given: freed memory is kept, OpenMP's threads keep waiting, and a user's choice stays."""

import os
import platform
import subprocess
import sys

import pytest

from minimind import openmp_environment

# How many pages the system has to give when 256 MiB are freed and wanted again, four times over.
FAULTS = """
import ctypes, resource, sys
from minimind.distributed.cpu_tuning import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "keep" else "left")
malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, malloc.argtypes, free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def touch():
    pointer = malloc(2**28)
    ctypes.memset(pointer, 1, 2**28)
    free(pointer)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(code: str, *args: str, **variables: str) -> list[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "OMP_", "GOMP_"))}
    result = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, env={**kept, **variables}, check=True
    )
    return result.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps its own habits")
def test_freed_memory_is_not_taken_anew():
    (answer, left), (kept_answer, kept) = run(FAULTS, "leave"), run(FAULTS, "keep")
    assert (answer, kept_answer) == ("left", "True")
    pages = 2**28 // os.sysconf("SC_PAGE_SIZE")
    assert int(kept) < pages // 10, "a block that was freed came back page by page"
    if "always" not in _huge_pages():  # with huge pages for everything even the default takes few faults
        assert int(left) > 3 * pages


def _huge_pages() -> str:
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
            return file.read().split("[")[1].split("]")[0]
    except (OSError, IndexError):
        return "never"


@pytest.mark.parametrize("chosen", [{"MALLOC_ARENA_MAX_": "1"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}])
def test_a_choice_of_malloc_stays(chosen):
    assert run(
        "from minimind.distributed.cpu_tuning import keep_freed_memory; print(keep_freed_memory())", **chosen
    ) == ["False"]


def test_openmp_is_told_before_torch_is_loaded():
    code = "import minimind, os, sys; print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])"
    assert run(code) == ["False", "ACTIVE"]
    assert run(code, OMP_WAIT_POLICY="PASSIVE") == ["False", "PASSIVE"]


def test_what_somebody_has_chosen_stays():
    assert openmp_environment({"OMP_WAIT_POLICY": "PASSIVE"}) == {}
    assert openmp_environment({"GOMP_SPINCOUNT": "5"}) == {"OMP_WAIT_POLICY": "ACTIVE", "KMP_BLOCKTIME": "200"}
