"""Top-p."""

from torch import Tensor


def top_p(probs: Tensor, p: float) -> Tensor:
    """(V,) -> (V,): the likeliest tokens until their sum reaches p, including the one that crosses; the others 0; then
    divided by what is left. The order of tokens stays.
    """
    ordered, places = probs.sort(descending=True)
    kept = ordered * (ordered.cumsum(0) - ordered < p)
    found = probs.new_zeros(len(probs))
    found[places] = kept
    return found / found.sum()
