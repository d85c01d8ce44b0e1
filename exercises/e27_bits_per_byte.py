"""A figure that two tokenizers share."""

import math


def bits_per_byte(loss: float, tokens: int, text: str) -> float:
    """From the mean loss a token (in nats) of a text that is so many tokens."""
    raise NotImplementedError
