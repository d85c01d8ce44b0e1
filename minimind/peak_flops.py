"""What a device could compute at most: the denominator of MFU.

A table for the accelerators whose makers publish a dense figure, one timed matrix product for everything else. Knows
nothing of models or training.
"""

import time

import torch

# Dense peak of the data sheets in FLOP/s, without sparsity: (bf16 and fp16, fp32 as torch computes it by default).
# The first name that is part of the device's own name counts, so the longer ones come first.
_DATA_SHEETS = (
    ("GB200", 2500e12, 80e12),
    ("B200", 2250e12, 80e12),
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
    """Peak of one device in FLOP/s for matrix products in `dtype`, and where the figure comes from."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, half, single in _DATA_SHEETS:
            if known in name:
                return (single if dtype == torch.float32 else half), f"data sheet of {known}"
    return measure_peak(device, dtype), "measured by a matrix product"


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate in FLOP/s of a square matrix product over a few short runs (about half a second on CPU)."""
    size = 8192 if device.type == "cuda" else 1024
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    best = 0.0
    started = time.perf_counter()
    while True:
        begin = time.perf_counter()
        torch.matmul(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        best = max(best, 2 * size**3 / (now - begin))
        if now - started > 0.4 and now - started > 3 * (now - begin):
            return best
