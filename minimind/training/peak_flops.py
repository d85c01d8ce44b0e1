"""Peak FLOP/s of a device, the denominator of MFU: from its data sheet, or measured by a timed matmul."""

import functools
import re
import time

import torch

from minimind.accelerator import device_name, synchronize
from minimind.model.kernels.matmul import matmul

# Dense peak of the data sheets in FLOP/s, without sparsity: (bf16 and fp16, fp32 as torch computes it by default).
# The first name found in the device's own as whole words counts ("RTX A4000" is no A40), so longer names come first.
_DATA_SHEETS = (
    ("GB200", 2500e12, 80e12),
    ("B200", 2250e12, 80e12),
    ("GH200", 989e12, 67e12),
    ("H200", 989e12, 67e12),
    ("H100 PCIe", 756e12, 51e12),
    ("H100 NVL", 835e12, 60e12),
    ("H100", 989e12, 67e12),
    ("H800", 989e12, 67e12),
    ("H20", 148e12, 44e12),
    ("A100", 312e12, 19.5e12),
    ("A800", 312e12, 19.5e12),
    ("A40", 149.7e12, 37.4e12),
    ("A30", 165e12, 10.3e12),
    ("A10G", 70e12, 35e12),
    ("A10", 125e12, 31.2e12),
    ("L40S", 362e12, 91.6e12),
    ("L40", 181e12, 90.5e12),
    ("L4", 121e12, 30.3e12),
    ("RTX 5090", 209.5e12, 104.8e12),
    ("RTX 4090", 165.2e12, 82.6e12),
    ("RTX 3090", 71e12, 35.6e12),
    ("V100", 112e12, 14e12),
    ("T4", 65e12, 8.1e12),
)


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Peak of one device in FLOP/s for matmuls in `dtype`, and the source of the figure."""
    if device.type != "cpu":
        found = data_sheet_peak(device_name(device), half=dtype != torch.float32)
        if found is not None:
            return found[0], f"data sheet of {found[1]}"
    return measure_peak(device, dtype), "measured by a matmul"


def data_sheet_peak(name: str, *, half: bool) -> tuple[float, str] | None:
    """Dense peak in FLOP/s of the accelerator called `name`, and its name in the table; None: not there.

    Args:
        half: bf16 and fp16, else fp32.
    """
    for known, half_peak, single_peak in _DATA_SHEETS:
        # A laptop's chip of the same name is slower, and a MIG slice is a part of a chip.
        if re.search(rf"\b{known}\b", name) and not re.search(r"\b(Laptop|MIG|D)\b", name):
            return (half_peak if half else single_peak), known
    return None


def known_accelerators() -> list[str]:
    """Names of the accelerators in the table."""
    return [name for name, _, _ in _DATA_SHEETS]


@functools.cache
def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate in FLOP/s of square matmuls, doubled in size until one takes a twentieth of a second.

    The size follows the speed: a CPU without instructions for `dtype` is a hundred times slower than one with them.
    Measured once in a process.
    """
    size, largest = (128, 4096) if device.type == "cpu" else (2048, 8192)
    best = 0.0
    while True:
        seconds = _time_matmul(device, dtype, size)
        best = max(best, 2 * size**3 / seconds)
        if seconds > 0.05 or size == largest:
            return best
        size *= 2


def _time_matmul(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Seconds of the fastest of three matmuls of size x size."""
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    fastest = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        matmul(left, right)
        synchronize(device)
        fastest = min(fastest, time.perf_counter() - begin)
    return fastest
