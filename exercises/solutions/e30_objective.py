"""Your own objective: DPO."""

import torch.nn.functional as F
from torch import Tensor


def dpo_loss(chosen: Tensor, rejected: Tensor, chosen_before: Tensor, rejected_before: Tensor, beta: float) -> Tensor:
    """(N,) -> (N,): the log-probabilities of both answers by the model and by the model as it began (arXiv 2305.18290).

    The loss of a pair is -ln sigmoid(beta * (how much likelier the chosen has become - how much the rejected has)).
    """
    return -F.logsigmoid(beta * ((chosen - chosen_before) - (rejected - rejected_before)))
