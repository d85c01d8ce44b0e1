"""The one door to the device of this machine: which it is, what it holds, what it computes in and what it lacks.

torch names an accelerator by its type: "cuda" (AMD's ROCm too), "mps" (Apple), "xpu" (Intel), "npu" (Ascend) and more.
Their modules (`torch.cuda`, `torch.xpu`, ...) have the same functions; Apple's gets them here.
"""

import os
from typing import Any

import torch

from minimind.errors import UserError, first_line

VISIBLE_DEVICES = {
    "cuda": ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"),
    "xpu": ("ZE_AFFINITY_MASK",),
    "npu": ("ASCEND_RT_VISIBLE_DEVICES",),
}
"""Environment variables that say which devices of a type a process sees."""


def accelerator_type() -> str | None:
    """The type of the accelerator that torch can use here; None: there is none, or DS_ACCELERATOR=cpu hides it."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":  # DeepSpeed's variable; torch has none that hides Apple's
        return None
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else found.type


def count_devices() -> int:
    """The accelerators that this process sees."""
    return torch.accelerator.device_count() if accelerator_type() else 0


def default_device() -> torch.device:
    """The accelerator, or the CPU where there is none."""
    return torch.device(accelerator_type() or "cpu")


def usable_device(name: str | None) -> torch.device:
    """The device of that name ("cpu", "cuda:1", "mps", ...), or `default_device`.

    Raises:
        UserError: there is no such device.
    """
    try:
        device = torch.device(name) if name else default_device()
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        there = ", ".join(filter(None, (accelerator_type(), "cpu")))
        raise UserError(f"device {name}: cannot be used ({first_line(error)}); this machine has {there}") from None
    return device


class _AppleModule:
    """`torch.mps` by the names of the others' functions. Memory is the machine's own; of it Metal recommends a part."""

    Event = torch.mps.Event

    @staticmethod
    def synchronize(device: object = None) -> None:
        torch.mps.synchronize()

    @staticmethod
    def get_device_name(device: object = None) -> str:
        return str(torch.backends.mps.get_name())

    @staticmethod
    def memory_allocated(device: object = None) -> int:
        return torch.mps.current_allocated_memory()

    @staticmethod
    def max_memory_allocated(device: object = None) -> int:
        """What the driver holds, which falls only when its cache is emptied: Apple counts no peak."""
        return torch.mps.driver_allocated_memory()

    @staticmethod
    def reset_peak_memory_stats(device: object = None) -> None:
        torch.mps.empty_cache()

    @staticmethod
    def mem_get_info(device: object = None) -> tuple[int, int]:
        total = torch.mps.recommended_max_memory()
        return total - torch.mps.driver_allocated_memory(), total

    @staticmethod
    def set_per_process_memory_fraction(fraction: float, device: object = None) -> None:
        torch.mps.set_per_process_memory_fraction(fraction)


def device_module(device: torch.device) -> Any:
    """torch's module of an accelerator's type, with the names of `torch.cuda`: `synchronize`, `mem_get_info`, `Event`,
    `get_device_name`, ..."""
    return _AppleModule if device.type == "mps" else torch.get_device_module(device)


def synchronize(device: torch.device) -> None:
    """Let the host wait until the device is done. A CPU always is."""
    if device.type != "cpu":
        device_module(device).synchronize(device)


def record_event(device: torch.device, *, timed: bool = False) -> Any:
    """An event of an accelerator, recorded on its current stream: `query`, `synchronize`, and of two that are `timed`,
    `elapsed_time` in milliseconds."""
    event = device_module(device).Event(enable_timing=timed)
    event.record()
    return event


def device_name(device: torch.device) -> str:
    """Its name, or the number of cores."""
    return f"{os.cpu_count()} cores" if device.type == "cpu" else device_module(device).get_device_name(device)


def computes_bf16(device: torch.device) -> bool:
    """Whether an accelerator computes in bf16 itself, and not in float32 with a rounding."""
    if device.type == "cuda" or device.type == "xpu":
        return bool(device_module(device).is_bf16_supported(including_emulation=False))
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return device.type != "cpu" and bool(device_module(device).is_bf16_supported())


def has_streams(device: torch.device) -> bool:
    """Whether copies run beside the computation, from pinned memory, on streams of their own."""
    return device.type not in ("cpu", "mps")


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def takes_one_process(device_type: str) -> bool:
    """Whether several ranks cannot compute there: no collective reaches its tensors."""
    return device_type == "mps"


def has_graphs(device: torch.device) -> bool:
    """Whether what a stream does can be captured and replayed: NVIDIA's GPUs."""
    return device.type == "cuda" and torch.version.hip is None


def compiles_with_triton(device_type: str) -> bool:
    """Whether torch.compile writes its kernels there in Triton: the default then."""
    return device_type in ("cuda", "xpu")


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """(major, minor) of one of NVIDIA's GPUs, such as (9, 0) for sm90; None: it is another device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def collectives_of(device: torch.device) -> str:
    """The library by which tensors of that device are exchanged: nccl, xccl, hccl or gloo."""
    return torch.distributed.get_default_backend_for_device(device.type)


def toolkit() -> str:
    """What torch was built for, such as `CUDA 13.0`."""
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return accelerator_type() or "CPUs alone"
