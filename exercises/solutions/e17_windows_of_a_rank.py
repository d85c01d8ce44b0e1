"""Who reads which window."""


def windows_of_a_rank(step: int, rank: int, ranks: int, micro: int, accumulation: int) -> list[list[int]]:
    """The places in the shuffled order that a rank reads in a step, one list a micro-batch.

    All ranks' first micro-batches come first in the order, rank by rank, then all their second ones.
    """
    start = step * micro * accumulation * ranks
    firsts = [start + (turn * ranks + rank) * micro for turn in range(accumulation)]
    return [list(range(first, first + micro)) for first in firsts]
