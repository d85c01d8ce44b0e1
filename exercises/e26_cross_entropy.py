"""The loss and its gradient, without overflow."""

from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(the sum of -ln p over the rows, its gradient by the logits): (N, V), (N,) -> (), (N, V).

    Right for logits of 1000 too. Not with log_softmax, softmax or cross_entropy.
    """
    raise NotImplementedError
