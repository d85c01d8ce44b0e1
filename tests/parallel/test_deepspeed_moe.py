"""A layer run by deepspeed.moe: the reference's where nothing is dropped, and what capacity and noise do."""

from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.moe.layer import MoE
from engine_runs import CPU
from expert_runs import EXPERTS, resolve

from minimind.model import MiniMindForCausalLM, ModelConfig
from minimind.model.layers import FeedForward
from minimind.parallel.engine import build_engine, build_model
from minimind.parallel.experts import attach_router_hooks, replace_experts

pytestmark = pytest.mark.usefixtures("group")

TOKENS = torch.randint(3, 64, (4, 17), generator=torch.Generator().manual_seed(2))


def build(model: dict[str, Any], **train: Any) -> tuple[MiniMindForCausalLM, MiniMindForCausalLM]:
    """The plain model, and the same with its experts taken over, as the engine has it."""
    resolved = resolve(1, 1, model, moe_backend="deepspeed", **train)
    plain, native = build_model(resolved, CPU), build_model(resolved, CPU)
    replace_experts(resolved, native)
    for module in native.modules():
        if hasattr(module, "set_deepspeed_parallelism"):
            module.set_deepspeed_parallelism()
    attach_router_hooks(resolved, native)
    return plain, native


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_experts_per_tok": 1, "n_shared_experts": 0},
        {"n_shared_experts": 0, "moe_residual": True},
        {"num_experts_per_tok": 1, "norm_topk_prob": False},
        {"num_experts_per_tok": 3, "norm_topk_prob": False, "routed_scaling_factor": 1.5},
        {"num_experts_per_tok": 4, "scoring_func": "sigmoid", "seq_aux": True, "router_z_loss_coef": 0.1},
    ],
    ids=str,
)
def test_without_dropping_it_is_the_reference(changes):
    plain, native = build({**EXPERTS, **changes})
    outputs = [model(TOKENS[:, :-1], TOKENS[:, 1:]) for model in (plain, native)]
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss)
    torch.testing.assert_close(outputs[1].aux_loss, outputs[0].aux_loss)
    assert torch.equal(outputs[1].expert_load, outputs[0].expert_load)
    assert outputs[1].dropped.tolist() == [0, 0] and outputs[0].dropped is None
    for output in outputs:
        (output.loss + output.aux_loss).backward()
    gates = [[layer.mlp.router.gate.weight.grad for layer in model.model.layers[1:]] for model in (plain, native)]
    for ours, theirs in zip(*gates, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * ours.norm()


def test_residual_experts_are_those_of_deepspeed():
    config = ModelConfig(**{**EXPERTS, "n_shared_experts": 0, "moe_residual": True})
    torch.manual_seed(0)
    block = MiniMindForCausalLM(config).model.layers[1]
    with torch.no_grad():
        block.residual.coefficient.bias.copy_(torch.tensor([0.5, -0.5]))
    expert = FeedForward(config, config.expert_feed_forward_size)
    options = {"drop_tokens": False, "min_capacity": 0, "top2_2nd_expert_sampling": False}
    theirs = MoE(32, expert, 8, k=2, use_residual=True, **options)
    theirs.set_deepspeed_parallelism()
    theirs.mlp.load_state_dict(block.residual.mlp.state_dict())
    theirs.coefficient.load_state_dict(block.residual.coefficient.state_dict())
    experts = theirs.deepspeed_moe.experts.deepspeed_experts
    with torch.no_grad():
        theirs.deepspeed_moe.gate.wg.weight.copy_(block.mlp.gate.weight)
        for number, one in enumerate(experts):
            gate, up = block.mlp.experts.gate_up_proj[number].chunk(2)
            one.gate_proj.weight.copy_(gate)
            one.up_proj.weight.copy_(up)
            one.down_proj.weight.copy_(block.mlp.experts.down_proj[number])
        hidden_states = torch.randn(2, 16, 32)
        ours = block.residual(hidden_states, block.mlp(hidden_states))
        torch.testing.assert_close(ours, theirs(hidden_states)[0], rtol=1e-4, atol=1e-5)
        assert (ours - block.mlp(hidden_states)).norm() > 0.1 * ours.norm()


def test_tokens_beyond_the_capacity_are_passed_over_and_counted():
    one = {**EXPERTS, "num_experts_per_tok": 1, "first_k_dense_replace": 2, "n_shared_experts": 0}
    _, native = build(one, moe_drop_tokens=True, moe_capacity_factor=0.5, moe_eval_capacity_factor=8.0)
    output = native(TOKENS[:, :-1], TOKENS[:, 1:])
    room = 4  # 64 tokens / 8 experts * 0.5
    load = output.expert_load[0]
    assert load.sum() == 64 and output.dropped.tolist() == [int((load - room).clamp(min=0).sum())]
    assert 0 < output.dropped[0] < 64
    assert native.eval()(TOKENS[:, :-1], TOKENS[:, 1:]).dropped.tolist() == [0]


def test_a_dropped_token_gets_nothing_from_its_expert():
    one = {**EXPERTS, "num_experts_per_tok": 1, "first_k_dense_replace": 2, "n_shared_experts": 0}
    _, native = build(one, moe_drop_tokens=True, moe_capacity_factor=0.5, moe_min_capacity=1)
    layer, hidden_states = native.model.layers[2].mlp, torch.randn(1, 64, 32)
    mixed = layer(hidden_states)[0]
    chosen = layer.router.gate(hidden_states[0]).argmax(dim=-1)
    for expert in range(8):
        taken = mixed[chosen == expert].abs().sum(dim=1) > 0
        assert taken.sum() == min(4, len(taken))


@pytest.mark.parametrize(
    ("top_k", "train"),
    [
        (1, {"moe_drop_tokens": True, "moe_random_selection": True}),
        (1, {"moe_gate_noise": "rsample"}),
        (2, {"moe_gate_noise": "jitter"}),
        (2, {"moe_sample_second": True}),
    ],
    ids=str,
)
def test_noise_is_of_training_and_repeated_by_a_recomputation(top_k, train):
    # Shallow routers, so that a jitter of one percent changes a choice.
    model = {**EXPERTS, "num_experts_per_tok": top_k, "num_experts": 32, "initializer_range": 0.02}
    _, native = build(model, **train)
    losses = [native(TOKENS[:, :-1], TOKENS[:, 1:]).loss for _ in range(2)]
    assert losses[0] != losses[1]
    grads = []
    for checkpointing in (False, True):
        native.set_activation_checkpointing(checkpointing)
        native.zero_grad()
        torch.manual_seed(5)
        native(TOKENS[:, :-1], TOKENS[:, 1:]).loss.backward()
        grads.append([parameter.grad.clone() for parameter in native.parameters() if parameter.grad is not None])
    for once, again in zip(*grads, strict=True):
        torch.testing.assert_close(once, again)
    native.eval()
    assert native(TOKENS[:, :-1], TOKENS[:, 1:]).loss == native(TOKENS[:, :-1], TOKENS[:, 1:]).loss


def test_an_optimizer_of_the_json_gets_the_experts_too():
    """Every parameter in exactly one group, the experts apart, and they move."""
    for backend in ("autoep", "deepspeed"):
        ds = {"optimizer": {"type": "RAdam", "params": {}}, "zero_allow_untested_optimizer": True}
        settings = {"moe_backend": backend, "optimizer": None, "betas": None, "eps": None}
        resolved = resolve(1, 1, EXPERTS, ds, **settings)
        engine = build_engine(resolved, build_model(resolved, CPU))
        names = [(group["name"], group.get("moe", False)) for group in engine.optimizer.param_groups]
        assert names == [("matrices", False), ("vectors", False), ("ep_size_1", True)]
        assert sum(len(group) for group in engine.optimizer.bit16_groups) == len(list(engine.module.parameters()))
        before = {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}
        for tokens in (TOKENS[:2], TOKENS[2:]):
            engine.backward(engine(tokens[:, :-1], tokens[:, 1:]).loss)
            engine.step()
        moved = [
            name for name, parameter in engine.module.named_parameters() if not torch.equal(parameter, before[name])
        ]
        assert moved == list(before)
        engine.destroy()


def test_the_layers_that_were_not_taken_over_are_noticed():
    resolved = resolve(1, 1, EXPERTS)
    with pytest.raises(RuntimeError, match="2 layers have experts, and DeepSpeed has taken over 0"):
        attach_router_hooks(resolved, MiniMindForCausalLM(ModelConfig(**EXPERTS)))


def test_the_selection_bias_keeps_float32_in_a_bf16_engine():
    model = {**EXPERTS, "router_bias_update_rate": 0.001, "scoring_func": "sigmoid"}
    resolved = resolve(1, 1, model, precision="bf16")
    engine = build_engine(resolved, build_model(resolved, CPU))
    assert isinstance(engine, deepspeed.DeepSpeedEngine)
    load = torch.tensor([[9, 0, 4, 4, 4, 4, 4, 3]]).expand(2, 8)
    for _ in range(3):
        engine.module.step_router_biases(load)
    bias = engine.module.router_record.routers[0].bias
    assert bias.dtype == torch.float32
    torch.testing.assert_close(bias, torch.tensor([-0.003, 0.003, 0, 0, 0, 0, 0, 0.003]))
    engine.destroy()
