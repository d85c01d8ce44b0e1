"""Two shared experts are one wider feed-forward."""

import torch
from torch import Tensor

Matrices = tuple[Tensor, Tensor, Tensor]


def join(first: Matrices, second: Matrices) -> Matrices:
    """Each is (gate, up, down) of shapes (I, d), (I, d), (d, I), used as down @ (silu(gate @ x) * (up @ x)).

    Returns the one feed-forward that gives the sum of both.
    """
    gate, up = (torch.cat((first[i], second[i])) for i in (0, 1))
    return gate, up, torch.cat((first[2], second[2]), dim=1)
