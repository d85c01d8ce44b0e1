"""YaRN's new frequencies."""

import math


def yarn_frequencies(head_size: int, base: float, trained: int, factor: float) -> list[float]:
    """The frequency of each pair for a context `factor` times as long: kept where a pair turns 32 times and more within
    `trained` tokens, divided by the factor at one turn and fewer, a ramp over the pairs between.
    """

    def pair_that_makes(turns: float) -> float:
        return head_size * math.log(trained / (turns * math.tau)) / (2 * math.log(base))

    low, high = math.floor(pair_that_makes(32)), math.ceil(pair_that_makes(1))
    found = []
    for pair in range(head_size // 2):
        ramp = min(max((pair - low) / (high - low), 0.0), 1.0)
        frequency = base ** (-2 * pair / head_size)
        found.append(frequency * (1 - ramp) + frequency / factor * ramp)
    return found
