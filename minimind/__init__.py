"""MiniMind on DeepSpeed: a plain PyTorch language model, trained by DeepSpeed from outside."""

import logging

__version__ = "0.1.0"

# DeepSpeed warns at its import on every machine without a GPU; the run itself says on what device it trains.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
