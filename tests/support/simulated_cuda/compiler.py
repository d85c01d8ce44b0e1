"""torch.compile without Triton: graphs are traced and differentiated as on a GPU, and run operator by operator."""

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch

_compile = torch._TorchCompileInductorWrapper.__call__


def _run_traced(self: Any, model: Any, inputs: Any) -> Any:
    # Not at the top: it is slow to import, and most processes compile nothing.
    from torch._dynamo.backends.debugging import aot_eager

    return aot_eager(model, inputs)


def install() -> None:
    """Take that for torch's own compiler where Triton is missing."""
    if importlib.util.find_spec("triton") is None:
        torch._TorchCompileInductorWrapper.__call__ = _run_traced


@contextlib.contextmanager
def without_stand_in() -> Iterator[None]:
    """torch's own compiler in the block, for what it writes; without Triton it cannot be run."""
    before = torch._TorchCompileInductorWrapper.__call__
    torch._TorchCompileInductorWrapper.__call__ = _compile
    try:
        yield
    finally:
        torch._TorchCompileInductorWrapper.__call__ = before
