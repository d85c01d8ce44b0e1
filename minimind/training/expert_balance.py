"""Balancing experts by the load of a whole optimizer step, over all its micro-batches and ranks: the auxiliary loss
(arXiv 2501.11873) and the selection biases (arXiv 2408.15664)."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from minimind.data.loader import Batch
from minimind.distributed.collectives import all_reduce_sum
from minimind.model.config import ModelConfig
from minimind.model.router import balance_over
from minimind.parallel.mesh import Mesh
from minimind.training.objectives.objective import LossParts, Objective


def balances_step(model: ModelConfig) -> bool:
    """Whether the auxiliary loss is that of the whole step."""
    is_batchwise = model.use_moe and not model.seq_aux and model.router_aux_loss_coef > 0
    return is_batchwise and model.aux_loss_scope != "micro"


@torch.no_grad()
def read_expert_share(objective: Objective, engine: Any, batches: Sequence[Batch], mesh: Mesh) -> torch.Tensor:
    """Each expert's share of the whole step's choices, (num_moe_layers, num_experts). Every rank calls this.

    `batches` are on the device. It has to be known before the first backward, so every micro-batch is read once more
    before, without a gradient.
    """
    shares = []
    for batch in batches:
        parts = objective.loss(engine, batch)
        assert parts.expert_share is not None
        shares.append(parts.expert_share)
    return mean_over_ranks(torch.stack(shares).mean(dim=0), mesh)


def mean_over_ranks(share: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """The mean of a tensor over all ranks that average. Every rank calls this."""
    return all_reduce_sum(share.clone(), mesh.averaging) / mesh.num_averaging


def step_aux_loss(parts: LossParts, share: torch.Tensor | None, model: ModelConfig, mesh: Mesh) -> torch.Tensor:
    """The auxiliary loss of a micro-batch with the load of the whole step. Every rank calls this.

    Args:
        share: what `read_expert_share` gave; None: this micro-batch is the whole step of its rank.
    """
    aux_loss, own, score = parts.aux_loss, parts.expert_share, parts.expert_score
    assert aux_loss is not None and own is not None and score is not None
    return balance_over(mean_over_ranks(own, mesh) if share is None else share, aux_loss, own, score, model)


def step_router_biases(engine: Any, counts: torch.Tensor, grad_norm: torch.Tensor | float | None, mesh: Mesh) -> None:
    """Move the routers' selection biases by the load of the whole step; a step whose gradient was not finite moves
    nothing. Every rank calls this.

    Args:
        counts: (num_moe_layers, num_experts + 1) of this rank's step, as in `LossParts`.
    """
    load = all_reduce_sum(counts[:, :-1].clone(), mesh.averaging)
    finite = grad_norm.isfinite() if isinstance(grad_norm, torch.Tensor) else math.isfinite(grad_norm or 0.0)
    engine.module.step_router_biases(load * finite)
