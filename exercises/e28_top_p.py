"""Top-p."""

from torch import Tensor


def top_p(probs: Tensor, p: float) -> Tensor:
    """(V,) -> (V,): the likeliest tokens until their sum reaches p, including the one that crosses; the others 0; then
    divided by what is left. The order of tokens stays.
    """
    raise NotImplementedError
