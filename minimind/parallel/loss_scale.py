"""fp16's dynamic loss scale: read it, and restore it at a resume.

DeepSpeed saves its own, but not torch's, which it uses at stage 0. A scale that began anew would skip steps until it
has come down.
"""

from collections.abc import Mapping
from typing import Any

import deepspeed


def read_grad_scaler(engine: Any) -> dict[str, Any] | None:
    """The state of torch's scaler as plain numbers, or None where the engine has none."""
    scaler = getattr(engine, "torch_autocast_z0_gradscaler", None)
    return None if scaler is None else scaler.state_dict()


def set_grad_scaler(engine: Any, saved: Mapping[str, Any] | None) -> None:
    """Continue torch's scaler where it was, if there was one and there is one here."""
    scaler = getattr(engine, "torch_autocast_z0_gradscaler", None)
    if scaler is not None and saved:
        scaler.load_state_dict(dict(saved))


def set_loss_scaler(engine: Any, saved: Mapping[str, Any] | None) -> None:
    """Continue DeepSpeed's scaler (stages 1 to 3) where it was, if it was dynamic and is."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if saved and getattr(scaler, "dynamic", False):
        vars(scaler).update(saved)


def loss_scale(engine: deepspeed.DeepSpeedEngine) -> float | None:
    """The dynamic loss scale of fp16, or None in other precisions."""
    scaler = getattr(engine, "torch_autocast_z0_gradscaler", None)
    if scaler is not None:
        return float(scaler.get_scale())
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else None
