"""torch.compile without Triton: graphs are traced and differentiated as on a GPU, and run operator by operator."""

import importlib.util
from typing import Any

import torch


def _run_traced(self: Any, model: Any, inputs: Any) -> Any:
    # Not at the top: it is slow to import, and most processes compile nothing.
    from torch._dynamo.backends.debugging import aot_eager

    return aot_eager(model, inputs)


def install() -> None:
    """Take that for torch's own compiler where Triton is missing."""
    if importlib.util.find_spec("triton") is None:
        torch._TorchCompileInductorWrapper.__call__ = _run_traced
