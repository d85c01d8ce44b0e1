"""The simulated device as torch's `cuda`, `mps`, `xpu` or `npu`: what each make's build of torch has for it."""

import functools
import importlib.machinery
import os
import sys
import types
from typing import Any

import torch
import torch.utils.cpp_extension

from simulated_device import collectives
from simulated_device.device_module import FUNCTIONS, device, device_type, state, use
from simulated_device.profiles import VISIBLE


def install() -> None:
    """Give this process the machine of its environment."""
    if device_type == "npu":
        torch.utils.rename_privateuse1_backend("npu")
        torch._register_device_module("npu", types.ModuleType("torch.npu"))
    device.install(device_type)
    {"cuda": _install_cuda, "mps": _install_mps, "xpu": _install_xpu, "npu": _install_npu}[device_type]()
    use(state.machine, os.environ.get(VISIBLE.get(device_type, "")))
    collectives.install()


def _answer(*modules: Any, whole: bool = False) -> None:
    """Exchange those of the device's functions that these modules have, or give them the whole."""
    for name, value in FUNCTIONS.items():
        # Every name is an object of its own: dynamo's tables refuse one object under two names.
        if isinstance(value, type):
            made: Any = type(value.__name__, (value,), {})
        else:
            made = functools.partial(lambda call, *args, **kwargs: call(*args, **kwargs), value)
        for module in modules:
            if whole or hasattr(module, name):
                setattr(module, name, made)


def _install_cuda() -> None:
    from simulated_device import compiler, graphs, operators

    cuda = torch.cuda
    _answer(cuda, cuda.memory, cuda.random, cuda.streams, cuda._utils)
    cuda._initialized = True
    bindings: dict[str, Any] = {
        "_cuda_getDeviceCount": lambda: len(state.visible),
        "_cuda_init": lambda: None,
        "_cuda_getDevice": device.current_device,
        "_cuda_setDevice": device.set_device,
        "_cuda_isInBadFork": lambda: False,
        "_cuda_getCurrentStream": lambda index: (device.current_stream(index), index, 1),
        "_cuda_getCurrentRawStream": device.current_stream,
        "_cuda_synchronize": lambda: device.synchronize(device.current_device()),
        "_cuda_emptyCache": lambda: None,
    }
    for name, value in bindings.items():
        setattr(torch._C, name, value)
    for name in ("range_push", "range_pop", "mark", "range_start", "range_end"):
        setattr(cuda.nvtx, name, lambda *_, **__: 0)
    cuda.nccl.version = lambda: (2, 29, 7)
    torch.utils.cpp_extension.CUDA_HOME = None  # a GPU, and no toolkit to compile for it
    operators.install()
    compiler.install()
    graphs.install()


def _install_mps() -> None:
    """torch.mps itself: its functions end in the hooks of hooks.h."""
    torch._C._has_mps = True
    bindings: dict[str, Any] = {
        "_mps_is_available": lambda: bool(state.visible),
        "_mps_get_default_generator": lambda: device.default_generator(0),
        "_mps_get_name": lambda: state.machine.profile.name,
        "_mps_get_core_count": lambda: state.machine.profile.processors,
    }
    for name, value in bindings.items():
        setattr(torch._C, name, value)


def _install_xpu() -> None:
    xpu = torch.xpu
    _answer(xpu, xpu.memory, xpu.random, xpu.streams)
    torch._C._has_xpu = xpu._initialized = True
    torch._C._xpu_getCurrentRawStream = device.current_stream


def _install_npu() -> None:
    """torch.npu, and a torch_npu for who imports it."""
    _answer(torch.npu, whole=True)
    for name, dtype in (("Float", torch.float32), ("Half", torch.half), ("BFloat16", torch.bfloat16)):
        setattr(torch.npu, f"{name}Tensor", functools.partial(torch.tensor, dtype=dtype, device="npu"))
    torch.utils.generate_methods_for_privateuse1_backend()
    package = types.ModuleType("torch_npu")
    package.__file__, package.__version__ = __file__, "0 (simulated)"
    package.__spec__ = importlib.machinery.ModuleSpec("torch_npu", None, origin=__file__)
    package.npu = torch.npu
    sys.modules["torch_npu"] = package
