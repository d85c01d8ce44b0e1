"""Which model generates or is evaluated, on which device and in which precision."""

from dataclasses import dataclass
from pathlib import Path

import torch

from minimind.accelerator import computes_bf16, usable_device
from minimind.config.run_config import DTYPE_NAMES, Precision
from minimind.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """What every command that uses a trained model asks for."""

    checkpoint: Path
    """A run's folder, one of its checkpoints, an exported folder, or a .pth."""
    tokenizer: Path | None = None
    """Tokenizer file or folder, if none is stored beside the weights."""
    precision: Precision | None = None
    """Arithmetic [default: bf16 on an accelerator that has it, otherwise fp32]."""
    int8: bool = False
    """On a CPU: 8-bit weights with bf16 arithmetic, the fastest; slightly less exact."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps, xpu, npu ... [default: the accelerator if there is one]."""


def choose_device(
    device: str | None, precision: Precision | None, *, int8: bool = False
) -> tuple[torch.device, torch.dtype]:
    """The given device and precision, or the best available; int8 weights need bf16 on a CPU.

    Raises:
        UserError: the device is absent, or does not support the precision.
    """
    if int8:
        device, precision = device or "cpu", precision or "bf16"
    chosen = usable_device(device)
    precision = precision or ("bf16" if computes_bf16(chosen) else "fp32")
    if int8 and (chosen.type, precision) != ("cpu", "bf16"):
        raise UserError("int8 works on a CPU in bf16 alone: leave out --precision, and give --device cpu or none")
    return chosen, getattr(torch, DTYPE_NAMES[precision])
