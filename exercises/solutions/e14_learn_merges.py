"""Byte-pair encoding, the training."""

from collections import Counter
from itertools import pairwise


def learn_merges(words: list[str], count: int) -> list[tuple[str, str]]:
    """The first `count` merges of the words, the most frequent neighbouring pair each time. There are no ties."""
    split, merges = [list(word) for word in words], []
    for _ in range(count):
        best = Counter(pair for word in split for pair in pairwise(word)).most_common(1)[0][0]
        merges.append(best)
        for word in split:
            place = 0
            while place < len(word) - 1:
                if (word[place], word[place + 1]) == best:
                    word[place : place + 2] = ["".join(best)]
                place += 1
    return merges
