"""The router's decision."""

from torch import Tensor


def route(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(N, E) -> the weights (N, k), summing to 1, and the experts (N, k) of the k largest softmax scores."""
    raise NotImplementedError
