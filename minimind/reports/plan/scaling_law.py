"""The loss as a function of size and tokens: fitted on runs of one's own, and the best of both for a budget."""

import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minimind.errors import UserError
from minimind.files import read_json

_EXPONENTS = np.arange(0.05, 1.51, 0.025)


class ScalingLaw(NamedTuple):
    """L(N, D) = floor + size / N^size_exponent + tokens / D^token_exponent (arXiv 2203.15556): bits a byte after D
    tokens. N is a token's operations in training, divided by 6."""

    floor: float
    size: float
    tokens: float
    size_exponent: float
    token_exponent: float
    largest: float = math.inf
    """Operations of the largest of the runs."""

    def __call__(self, size: float, tokens: float) -> float:
        """The loss of N and D."""
        return self.floor + self.size * size**-self.size_exponent + self.tokens * tokens**-self.token_exponent

    def best_size(self, budget: float) -> float:
        """The N that learns most from 6 N D = `budget` operations: there both terms fall alike with the budget."""
        steep = self.size * self.size_exponent / (self.tokens * self.token_exponent)
        power = self.size_exponent + self.token_exponent
        return float((steep * (budget / 6) ** self.token_exponent) ** (1 / power))


def fit_law(points: np.ndarray) -> ScalingLaw:
    """The law with the smallest squares of relative errors: its exponents by trial, what is linear by least squares.

    Args:
        points: (n, 3) float64: N, D and the loss.

    Raises:
        UserError: the losses do not fall with size and tokens.
    """
    sizes, tokens, losses = points.T
    found = []
    for a, b in itertools.product(_EXPONENTS, _EXPONENTS):
        columns = np.stack([np.ones_like(sizes), sizes**-a, tokens**-b], axis=1) / losses[:, None]
        factors, *_ = np.linalg.lstsq(columns, np.ones_like(losses), rcond=None)
        if factors[0] >= 0 and (factors[1:] > 0).all():
            found.append((float(np.square(columns @ factors - 1).sum()), (*factors, a, b)))
    if not found:
        raise UserError("no scaling law: the losses do not fall with size and tokens; take longer runs or more sizes")
    return ScalingLaw(*map(float, min(found)[1]))._replace(largest=float(6 * (sizes * tokens).max()))


def read_law(path: str) -> ScalingLaw:
    """What `benchmarks/scaling_law.py` has written.

    Raises:
        UserError: the file holds no law.
    """
    content = read_json(Path(path), "--law of benchmarks/scaling_law.py")
    try:
        law = ScalingLaw(**{name: float(value) for name, value in content["measured"]["law"].items()})
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"law: {path} holds none; give the JSON that benchmarks/scaling_law.py writes") from None
    if not all(map(math.isfinite, law[:5])) or min(law[1:]) <= 0:
        raise UserError(f"law: {path}: {json.dumps(law._asdict())} is none: all but the floor are above 0")
    return law
