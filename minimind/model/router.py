"""What follows from a router's logits: a token's experts, their weights, the load, and the losses that balance it.

Pure functions, and the record that gathers the logits by hooks on the gates, so that the balance is computed in the
same way whoever runs the experts. Refuses to know of expert weights, backends and ranks.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minimind.model.config import ModelConfig

# The name DeepSpeed's AutoEP looks for, and keeps, when it takes a layer over.
BIAS_NAME = "e_score_correction_bias"


def score_experts(router_logits: Tensor, config: ModelConfig) -> Tensor:
    """Float32 scores (..., num_experts) of router logits (..., num_experts)."""
    logits = router_logits.float()
    return logits.softmax(dim=-1) if config.scoring_func == "softmax" else logits.sigmoid()


def choose_experts(scores: Tensor, config: ModelConfig, bias: Tensor | None) -> Tensor:
    """The experts of each token, (..., num_experts_per_tok) int64: those of the highest score plus `bias`."""
    choice = scores if bias is None else scores + bias
    return choice.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices


def route(router_logits: Tensor, config: ModelConfig, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weights and experts of each token, both (N, num_experts_per_tok): float32 and int64.

    The `bias` (num_experts,) decides who is chosen and has no part in the weights (DeepSeek-V3, arXiv 2412.19437).
    """
    scores = score_experts(router_logits, config)
    experts = choose_experts(scores, config, bias)
    return expert_weights(scores, experts, config), experts


def expert_weights(scores: Tensor, experts: Tensor, config: ModelConfig) -> Tensor:
    """The weight of each token's experts, (N, K) float32, from its scores (N, num_experts).

    `experts` (N, K) int64; -1 is an expert that does not take the token: it weighs 0 and does not count in the sum that
    `norm_topk_prob` divides by.
    """
    weights = scores.gather(-1, experts.clamp(min=0)).masked_fill(experts < 0, 0.0)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * config.routed_scaling_factor


class RouterBalance(NamedTuple):
    """How evenly the routers of one forward spread its tokens."""

    aux_loss: Tensor
    """Float32 scalar, summed over the layers, coefficients included."""
    expert_load: Tensor
    """(num_moe_layers, num_experts) int64: tokens sent to each expert; a token counts once for each of its experts."""
    expert_share: Tensor
    """(num_moe_layers, num_experts) float32: each expert's share of the choices, summing to 1 in a layer."""
    expert_score: Tensor
    """(num_moe_layers, num_experts) float32: mean score of each expert, scores of a token summing to 1."""
    dropped: Tensor | None = None
    """(num_moe_layers,) int64: those of them that found no room; None where nothing is ever dropped."""


def router_aux_loss(
    router_logits: Sequence[Tensor],
    config: ModelConfig,
    batch_shape: tuple[int, int],
    biases: Sequence[Tensor | None] = (),
) -> RouterBalance:
    """The losses that balance the experts, and their load, from each MoE layer's logits (B*T, num_experts).

    Load balancing: router_aux_loss_coef * sum_i f_i * P_i, where f_i is expert i's share of the choices times the
    number of experts and P_i its mean score (scores of a token summing to 1): 1 when balanced. Over the whole batch
    (arXiv 2101.03961) or, with `seq_aux`, for each sequence, averaged (arXiv 2405.04434). Router z-loss:
    router_z_loss_coef * mean(logsumexp(logits)**2) (arXiv 2202.08906). Both are means over this batch's tokens; where
    it is a part of a step, `balance_over` widens the first.

    Args:
        batch_shape: (B, T).
        biases: the selection bias of each layer, where there is one.
    """
    logits = torch.stack([layer.float() for layer in router_logits]).unflatten(1, batch_shape)  # (L, B, T, E)
    scores = score_experts(logits, config)
    with torch.no_grad():
        present = [bias for bias in biases if bias is not None]
        bias = torch.stack(present).float()[:, None, None] if present else None  # (L, 1, 1, E)
        experts = choose_experts(scores, config, bias).flatten(2)  # (L, B, T * K)
        load = torch.zeros_like(logits[:, :, 0], dtype=torch.int64)  # (L, B, E)
        load.scatter_add_(-1, experts, torch.ones_like(experts))
    if config.scoring_func == "sigmoid":
        scores = scores / scores.sum(dim=-1, keepdim=True)
    shares, mean_scores = load.float() / experts.shape[-1], scores.mean(dim=2)  # (L, B, E)
    share, mean_score = shares.mean(dim=1), mean_scores.mean(dim=1)  # (L, E)
    if not config.seq_aux:
        shares, mean_scores = share.unsqueeze(1), mean_score.unsqueeze(1)  # (L, 1, E)
    balance = (shares * mean_scores).sum(dim=-1) * config.num_experts  # (L, B) or (L, 1)
    aux_loss = config.router_aux_loss_coef * balance.mean(dim=1).sum()
    if config.router_z_loss_coef:
        z_losses = logits.logsumexp(dim=-1).square().flatten(1).mean(dim=1)
        aux_loss = aux_loss + config.router_z_loss_coef * z_losses.sum()
    return RouterBalance(aux_loss, load.sum(dim=1), share, mean_score)


def balance_over(step_share: Tensor, aux_loss: Tensor, share: Tensor, score: Tensor, config: ModelConfig) -> Tensor:
    """The auxiliary loss of a micro-batch, with f of the whole optimizer step in place of its own (arXiv 2501.11873).

    The mean over the micro-batches and ranks of a step is then the loss of the step as one batch, on any topology.

    Args:
        step_share: (L, E), the mean of `RouterBalance.expert_share` over the step's micro-batches and ranks.
        aux_loss, share, score: `RouterBalance.aux_loss`, `.expert_share` and `.expert_score` of the micro-batch.
    """
    return aux_loss + config.router_aux_loss_coef * config.num_experts * ((step_share - share) * score).sum()


@torch.no_grad()
def step_bias(bias: Tensor, load: Tensor, rate: float) -> None:
    """Raise in place the selection bias (num_experts,) of underloaded experts by `rate`, lower that of overloaded ones.

    `load` (num_experts,) is the step's, over all micro-batches and ranks (arXiv 2408.15664).
    """
    load = load.to(bias.device, torch.float32)
    bias += (rate * (load.mean() - load).sign()).to(bias.dtype)


class Router(NamedTuple):
    """Where one layer's router is found, whichever backend holds it."""

    gate: nn.Module
    """The linear layer that gives the logits."""
    bias_owner: nn.Module
    """The module whose buffer `e_score_correction_bias` is the selection bias, if it has one."""

    @property
    def bias(self) -> Tensor | None:
        """The selection bias (num_experts,), or None."""
        return getattr(self.bias_owner, BIAS_NAME, None)


class RouterRecord:
    """Gathers the logits of every router during one forward; what a checkpointed backward recomputes is passed over."""

    def __init__(self) -> None:
        self.routers: tuple[Router, ...] = ()
        self._hooks: list[Any] = []
        self._logits: list[Tensor] = []
        self._open = False

    def watch(self, routers: Sequence[Router]) -> None:
        """Listen to these routers, in the order of the layers, and no longer to the former ones."""
        for hook in self._hooks:
            hook.remove()
        self.routers = tuple(routers)
        self._hooks = [router.gate.register_forward_hook(self._keep) for router in routers]

    def start(self) -> None:
        """Forget what was gathered and gather anew."""
        self._logits, self._open = [], True

    def finish(self, config: ModelConfig, batch_shape: tuple[int, int]) -> RouterBalance:
        """Stop gathering; the balance of what was gathered since `start`."""
        logits, self._logits, self._open = self._logits, [], False
        if len(logits) != len(self.routers):
            raise RuntimeError(f"{len(self.routers)} routers are watched, {len(logits)} gave logits")
        return router_aux_loss(logits, config, batch_shape, [router.bias for router in self.routers])

    def _keep(self, _gate: nn.Module, _inputs: Any, logits: Tensor) -> None:
        if self._open:
            self._logits.append(logits)
