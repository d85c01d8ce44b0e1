"""Collectives of NCCL, XCCL and HCCL: gloo works on the same bytes, seen as tensors of the CPU, and the order of
streams is theirs. Apple's GPU has none: gloo refuses its tensors.

A collective waits for the current stream and runs on one of its own; the current stream waits for it at once, or where
the program waits for an asynchronous one.
"""

import collections
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from simulated_device.device_module import device, device_type

BACKENDS = {"cuda": "nccl", "xpu": "xccl", "npu": "hccl"}

# The arguments that each of them writes; it reads its other tensors, and those that it reduces in place.
WRITTEN = {
    "all_reduce": {"tensor"},
    "all_reduce_coalesced": {"tensors"},
    "broadcast": {"tensor"},
    "reduce": {"tensor"},
    "all_gather": {"tensor_list"},
    "all_gather_coalesced": {"output_tensor_lists"},
    "all_gather_into_tensor": {"output_tensor"},
    "_all_gather_base": {"output_tensor"},
    "reduce_scatter": {"output"},
    "reduce_scatter_tensor": {"output"},
    "_reduce_scatter_base": {"output"},
    "all_to_all": {"output_tensor_list"},
    "all_to_all_single": {"output"},
    "gather": {"gather_list"},
    "scatter": {"tensor"},
    "send": set(),
    "isend": set(),
    "recv": {"tensor"},
    "irecv": {"tensor"},
}

seen: collections.Counter[str] = collections.Counter()
"""How often each was called with tensors of the device."""


class Work:
    """The handle of an asynchronous collective."""

    def __init__(self, work: Any, collective: Any) -> None:
        self._work, self._collective = work, collective

    def wait(self, *args: Any) -> bool:
        """Let the current stream wait for the collective."""
        self._work.wait(*args)
        self._collective.wait()
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor) and value.device.type == device_type:
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def as_host(value: Any) -> Any:
    """Tensors of the device, in lists too, as tensors of the CPU over the same bytes."""
    if isinstance(value, torch.Tensor) and value.device.type == device_type:
        return device.as_host(value.detach())
    if isinstance(value, (list, tuple)):
        return type(value)(as_host(part) for part in value)
    return value


def _through_gloo(function: Callable[..., Any], written: set[str]) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        reads = [t.detach() for name, value in given.items() if name not in written for t in _tensors(value)]
        writes = [t.detach() for name, value in given.items() if name in written for t in _tensors(value)]
        if not reads and not writes:
            return function(*args, **kwargs)
        seen[function.__name__] += 1
        collective = device.collective(reads, writes, f"{BACKENDS[device_type]}:{function.__name__}")
        work = function(*map(as_host, args), **{name: as_host(value) for name, value in kwargs.items()})
        if hasattr(work, "wait"):
            return Work(work, collective)
        collective.wait()
        return work

    return call


def _as_gloo(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        own = BACKENDS[device_type]
        args = tuple(arg.replace(own, "gloo") if isinstance(arg, str) else arg for arg in args)
        if isinstance(kwargs.get("backend"), str):
            kwargs["backend"] = kwargs["backend"].replace(own, "gloo")
        kwargs.pop("device_id", None)
        return function(*args, **kwargs)

    return call


def install() -> None:
    """Let torch.distributed take gloo where a program asks for the device's own."""
    if device_type not in BACKENDS:
        return
    made = {
        name: _through_gloo(getattr(c10d, name), written) for name, written in WRITTEN.items() if hasattr(c10d, name)
    }
    for name in ("init_process_group", "new_group", "_new_process_group_helper"):
        made[name] = _as_gloo(getattr(c10d, name))
    for name, function in made.items():
        for module in (c10d, dist):
            if hasattr(module, name):
                setattr(module, name, function)
    own = BACKENDS[device_type]
    if own.upper() in dir(dist.Backend):
        setattr(dist, f"is_{own}_available", lambda: True)
        setattr(c10d, f"is_{own}_available", lambda: True)
    else:
        dist.Backend.register_backend(own, None, devices=[device_type])
