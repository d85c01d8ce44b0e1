"""The idea of flash attention: a softmax over blocks that are seen once."""

import math

from torch import Tensor


def attend_in_blocks(scores: list[Tensor], values: list[Tensor]) -> Tensor:
    """One query's output (d_h,) from blocks of scores (n,) and values (n, d_h), each read once, one at a time.

    Keep the largest score so far, the sum and the output, and correct both when a larger score comes.
    """
    largest, total = -math.inf, scores[0].new_zeros(())
    output = values[0].new_zeros(values[0].shape[-1])
    for block, rows in zip(scores, values, strict=True):
        new = max(largest, float(block.max()))
        correction = math.exp(largest - new)
        powers = (block - new).exp()
        total = total * correction + powers.sum()
        output = output * correction + powers @ rows
        largest = new
    return output / total
