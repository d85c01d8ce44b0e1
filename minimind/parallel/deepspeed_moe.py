"""One MoE layer run by `deepspeed.moe`, which chooses experts and drops tokens. The weights of the chosen experts, the
shared experts and the balance are the model's own.
"""

from typing import Any

import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import TopKGate
from torch import Tensor, nn

from minimind.config.resolved_run import ResolvedTrain
from minimind.model.config import ModelConfig
from minimind.model.layers import FeedForward
from minimind.model.moe import MoEFeedForward
from minimind.model.router import Router, RouterBalance, RouterRecord, expert_weights, score_experts


class Gate(TopKGate):
    """DeepSpeed's choice of experts with the model's weights: `scoring_func`, `norm_topk_prob` (over the experts that
    took the token) and `routed_scaling_factor` mean what they mean everywhere."""

    def __init__(self, config: ModelConfig, train: ResolvedTrain) -> None:
        noise = {"jitter": "Jitter", "rsample": "RSample"}.get(train.moe_gate_noise)
        super().__init__(
            config.hidden_size,
            config.num_experts,
            config.num_experts_per_tok,
            train.moe_capacity_factor,
            train.moe_eval_capacity_factor,
            train.moe_min_capacity if train.moe_drop_tokens else 0,
            noise,
            train.moe_drop_tokens,
            train.moe_random_selection,
            top2_2nd_expert_sampling=train.moe_sample_second,
        )
        self.config = config
        self._random = (train.moe_random_selection, train.moe_sample_second)

    def forward(self, *inputs: Any, **options: Any) -> tuple[Any, ...]:
        """(N, hidden_size) tokens -> what `deepspeed.moe` dispatches by: experts (K, N), -1 where one has no room,
        their weights (K, N), how many tokens chose each expert (num_experts,), and more."""
        # DeepSpeed would draw in evaluation too.
        self.use_rts, self.top2_2nd_expert_sampling = self._random if self.training else (False, False)
        aux_loss, capacity, num_experts, experts, slots, _, counts = super().forward(*inputs, **options)
        scores = score_experts(self.wg(inputs[0]), self.config)  # a call of the module: the balance listens to it
        weights = expert_weights(scores, experts.t().long(), self.config)
        return aux_loss, capacity, num_experts, experts, slots, weights.t(), counts


class NativeExperts(nn.Module):
    """In place of a `MoEFeedForward`; every rank of a group of `ep_size` has its share of the experts. The weights of
    router and experts are yet to be filled in.

    Args:
        source: the layer to replace; its shared experts move here.
    """

    def __init__(self, source: MoEFeedForward, train: ResolvedTrain) -> None:
        super().__init__()
        config = source.config
        with source.gate.weight.device:
            expert = FeedForward(config, config.expert_feed_forward_size)
            self.moe = MoE(config.hidden_size, expert, config.num_experts, train.ep_size, config.num_experts_per_tok)
            self.moe.deepspeed_moe.gate = Gate(config, train)
        self.shared_experts = source.shared_experts

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, hidden_size) -> the same shape."""
        mixed, _, _ = self.moe(hidden_states)
        return mixed if self.shared_experts is None else mixed + self.shared_experts(hidden_states)

    @property
    def router(self) -> Router:
        """Where this layer's logits are."""
        gate = self.moe.deepspeed_moe.gate
        return Router(gate.wg, gate)


class GateRecord(RouterRecord):
    """The balance of routers whose choice is DeepSpeed's: the load as it was, noise and all, and what was dropped."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: list[tuple[Tensor, Tensor]] = []

    def watch(self, routers: Any) -> None:
        """As in `RouterRecord`, and to the gates as a whole."""
        super().watch(routers)
        self._hooks += [router.bias_owner.register_forward_hook(self._count) for router in routers]

    def start(self) -> None:
        """Forget what was gathered and gather anew."""
        super().start()
        self._counts = []

    def finish(self, config: ModelConfig, batch_shape: tuple[int, int]) -> RouterBalance:
        """As in `RouterRecord`; losses are those of the logits without noise."""
        balance, counts = super().finish(config, batch_shape), self._counts
        self._counts = []
        loads, dropped = (torch.stack(values) for values in zip(*counts, strict=True))
        return balance._replace(expert_load=loads, dropped=dropped)

    def _count(self, _gate: nn.Module, _inputs: Any, outputs: tuple[Any, ...]) -> None:
        if self._open:
            self._counts.append((outputs[-1].long(), (outputs[3] < 0).sum()))
