"""Which model generates or is evaluated, on which device and in which precision."""

from dataclasses import dataclass
from pathlib import Path

import torch

from minimind.config.run_config import DTYPE_NAMES, Precision
from minimind.errors import UserError, first_line


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """What every command that uses a trained model asks for."""

    checkpoint: Path
    """A run's folder, one of its checkpoints, an exported folder, or a .pth."""
    tokenizer: Path | None = None
    """Tokenizer file or folder, if none is stored beside the weights."""
    precision: Precision | None = None
    """Arithmetic [default: bf16 on a GPU that has it, otherwise fp32]."""
    int8: bool = False
    """On a CPU: 8-bit weights with bf16 arithmetic, the fastest; slightly less exact."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... [default: a GPU if there is one]."""


def choose_device(
    device: str | None, precision: Precision | None, *, int8: bool = False
) -> tuple[torch.device, torch.dtype]:
    """The given device and precision, or the best available; int8 weights need bf16 on a CPU.

    Raises:
        UserError: the device is absent, or does not support the precision.
    """
    if int8:
        device, precision = device or "cpu", precision or "bf16"
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device} cannot be used: {first_line(error)}") from None
    if precision is None:
        has_bf16 = chosen.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if has_bf16 else "fp32"
    if int8 and (chosen.type, precision) != ("cpu", "bf16"):
        raise UserError("int8 works on a CPU in bf16 alone: leave out --precision, and give --device cpu or none")
    return chosen, getattr(torch, DTYPE_NAMES[precision])
