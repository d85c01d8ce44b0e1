"""Gradient clipping by the norm of all."""

from torch import Tensor


def clip(gradients: list[Tensor], limit: float) -> float:
    """Scale all gradients in place, so that their norm together is at most `limit`. Returns the norm before."""
    raise NotImplementedError
