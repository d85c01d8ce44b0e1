"""Muon's heart."""

from torch import Tensor


def orthogonalize(matrix: Tensor) -> Tensor:
    """The matrix (rows <= columns) with all singular values brought near 1: scale it to norm 1, then five times
    X <- a X + (b A + c A^2) X with A = X X^T, a = 3.4445, b = -4.7750, c = 2.0315. No factor for the shape.
    """
    found = matrix / matrix.norm()
    for _ in range(5):
        gram = found @ found.T
        found = 3.4445 * found + (-4.7750 * gram + 2.0315 * gram @ gram) @ found
    return found
