"""The idea of flash attention: a softmax over blocks that are seen once."""

import math

from torch import Tensor


def attend_in_blocks(scores: list[Tensor], values: list[Tensor]) -> Tensor:
    """One query's output (d_h,) from blocks of scores (n,) and values (n, d_h), each read once, one at a time.

    Keep the largest score so far, the sum and the output, and correct both when a larger score comes.
    """
    raise NotImplementedError
