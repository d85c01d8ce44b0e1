"""MiniMind on DeepSpeed: a plain PyTorch language model, trained by DeepSpeed from outside."""

import logging
import os
from collections.abc import Mapping

__version__ = "0.1.0"


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


os.environ.update(openmp_environment(os.environ))  # read when torch is loaded, which every module below may do

# DeepSpeed warns at its import on every machine without a GPU; the run itself says on what device it trains.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
