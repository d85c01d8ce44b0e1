"""Device and precision for generation and evaluation."""

import torch

from minimind.config.run_config import DTYPE_NAMES, Precision
from minimind.errors import UserError, first_line


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
