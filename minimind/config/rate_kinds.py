"""Whose learning rate a parameter has, by its name and shape, where Muon is the optimizer."""

from collections.abc import Sequence
from typing import Literal

from minimind.model.tuning import EMBEDDING

RateKind = Literal["muon", "embedding", "matrices", "vectors"]
"""Parameters that have a learning rate in common under Muon: its own; an embedding that is not the output matrix too;
what makes scores of hidden states (the output matrix, routers) and other matrices; norms and biases."""

_NOT_FOR_MUON = ("embed_tokens.", "lm_head.", ".gate.", ".coefficient.", ".lora_")


def is_for_muon(name: str, shape: Sequence[int]) -> bool:
    """Whether Muon updates a parameter, where it is the optimizer: the matrices between embedding and output, in which
    no row or column stands for a token, no row for an expert as in a router's, and none is an adapter's. Of stacked
    experts (E, rows, columns) each is a matrix."""
    return len(shape) >= 2 and not any(part in name for part in _NOT_FOR_MUON)


def rate_kind(name: str, shape: Sequence[int], *, tied: bool) -> RateKind:
    """Whose rate a parameter has beside Muon.

    Args:
        tied: the embedding is the output matrix too, and has its rate.
    """
    if is_for_muon(name, shape):
        return "muon"
    if len(shape) < 2:
        return "vectors"
    return "embedding" if name == EMBEDDING and not tied else "matrices"
