"""YaRN's new frequencies."""

import math


def yarn_frequencies(head_size: int, base: float, trained: int, factor: float) -> list[float]:
    """The frequency of each pair for a context `factor` times as long: kept where a pair turns 32 times and more within
    `trained` tokens, divided by the factor at one turn and fewer, a ramp over the pairs between.
    """
    raise NotImplementedError
