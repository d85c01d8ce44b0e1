"""Gradient clipping by the norm of all."""

from torch import Tensor


def clip(gradients: list[Tensor], limit: float) -> float:
    """Scale all gradients in place, so that their norm together is at most `limit`. Returns the norm before."""
    norm = float(sum(gradient.square().sum() for gradient in gradients)) ** 0.5
    for gradient in gradients:
        gradient *= min(1.0, limit / norm)
    return norm
