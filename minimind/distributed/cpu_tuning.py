"""The C library's malloc, set to keep freed memory: faster training on a CPU with the same results."""

import ctypes
import os

# glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_NEVER = -1
_LARGEST = 2**31 - 1
_GROWTH = 64 * 2**20


def keep_freed_memory() -> bool:
    """Let malloc keep freed memory; returns whether it does.

    By default glibc returns every freed block of more than 32 MiB to the system and takes it back page by page, 450,000
    page faults in a ZeRO-2 step of minimind3: gradient buffers are freed and allocated again in each micro-batch. The
    price: the process keeps its peak until it ends, plus fragmentation.
    The user's own settings (MALLOC_*, glibc.malloc in GLIBC_TUNABLES) take precedence.
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
