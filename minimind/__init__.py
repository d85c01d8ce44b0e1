"""MiniMind on DeepSpeed: a plain PyTorch language model, trained by DeepSpeed from outside."""

import logging
import os

from minimind.distributed.cpu_tuning import openmp_environment

__version__ = "0.1.0"

os.environ.update(openmp_environment(os.environ))  # read when torch is loaded, which every module below may do

# DeepSpeed warns at its import on every machine without a GPU; the run itself says on what device it trains.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
