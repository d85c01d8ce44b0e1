"""Two settings of the C library and of OpenMP that cost a CPU training time where they are left alone.

Neither changes a result. Imports nothing heavy: the one is read when torch is loaded, so it comes before torch.
"""

import ctypes
import os
from collections.abc import Mapping

# glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_NEVER = -1
_LARGEST = 2**31 - 1
_GROWTH = 64 * 2**20


def openmp_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables to add before torch is loaded, so that the threads of a product keep waiting for the next one.

    libgomp waits in a short loop between two parallel regions, but nearly gives that up once a process has more threads
    in teams than cores, and every small operation takes twice as long from then on. ACTIVE with libgomp's usual count
    keeps it waiting over some ten microseconds even then, though not over the longer pauses of ZeRO 3: `cpu_gather`
    keeps gloo from founding such teams. LLVM's OpenMP gets its usual 200 ms. Empty where somebody has chosen already.
    """
    if "OMP_WAIT_POLICY" in environment:
        return {}
    usual = {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}
    return {name: value for name, value in usual.items() if name not in environment}


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed; whether it does.

    By default glibc gives every freed block of more than 32 MiB back to the system, and takes it again page by page,
    450,000 page faults in a ZeRO-2 step of minimind3: buffers of gradients are freed and wanted again in each
    micro-batch. The process then keeps its peak until it ends, and some more between blocks in use.
    Someone's own settings (MALLOC_*, glibc.malloc in GLIBC_TUNABLES) stay.
    """
    chosen = any(name.startswith("MALLOC_") and name.endswith("_") for name in os.environ)
    if chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        return False
    settings = ((_M_MMAP_THRESHOLD, _LARGEST), (_M_TRIM_THRESHOLD, _NEVER), (_M_TOP_PAD, _GROWTH))
    return all([mallopt(name, value) == 1 for name, value in settings])
