"""Byte-pair encoding, the training."""

from collections import Counter
from itertools import pairwise


def learn_merges(words: list[str], count: int) -> list[tuple[str, str]]:
    """The first `count` merges of the words, the most frequent neighbouring pair each time. There are no ties."""
    raise NotImplementedError
