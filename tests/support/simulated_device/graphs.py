"""CUDA graphs: what runs while one is captured is written down, and done again by each replay, in the same tensors."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Capture(TorchDispatchMode):
    """Writes down what is done. It is done at once, too, as its shapes are needed; `undo` takes that back, since a
    capture changes nothing."""

    def __init__(self, done: list[tuple[Any, ...]]) -> None:
        super().__init__()
        self.done = done
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before.append((value, value.clone()))
        made = func(*args, **kwargs)
        if any(
            not leaf.is_cuda for leaf in tree_leaves((args, kwargs, made)) if isinstance(leaf, Tensor) and leaf.ndim
        ):
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {func}")
        # Kept alive: as in a graph's own pool, nothing else gets their memory.
        self.done.append((func, args, kwargs, made))
        return made

    def undo(self) -> None:
        for tensor, value in reversed(self.before):
            tensor.copy_(value)


class CUDAGraph:
    """torch.cuda.CUDAGraph."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.done: list[tuple[Any, ...]] = []

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        if torch.cuda.current_stream() == torch.cuda.default_stream():
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        self.capture = _Capture(self.done)
        self.capture.__enter__()

    def capture_end(self) -> None:
        self.capture.__exit__(None, None, None)
        self.capture.undo()

    def replay(self) -> None:
        for func, args, kwargs, made in self.done:
            held = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if _is_ours(leaf)}
            for old, new in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
                # A view, or what was written in place, is there already.
                if _is_ours(old) and old.untyped_storage().data_ptr() not in held:
                    old.copy_(new)


def _is_ours(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_cuda


def install() -> None:
    """Give `torch.cuda` its graphs."""
    torch.cuda.CUDAGraph = CUDAGraph  # type: ignore[misc]
