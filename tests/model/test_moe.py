"""Mixture of experts: the layer against a plain loop, the model against transformers', and the routers' balance."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from minimind.model import PRESETS, KVCache, MiniMindForCausalLM, ModelConfig
from minimind.model.kernels.apply import apply_kernels
from minimind.model.moe import MoEFeedForward
from minimind.model.router import RouterRecord, route, router_aux_loss, step_bias

TINY = dataclasses.replace(PRESETS["tiny-moe"], vocab_size=200, num_hidden_layers=2)
MILLIONS = {"minimind3-moe": (198.42, 63.94), "minimind2-moe": (145.03, 91.95)}


def make_layer(**changes):
    torch.manual_seed(0)
    layer = MoEFeedForward(dataclasses.replace(TINY, initializer_range=0.3, **changes))
    if layer.config.router_bias_update_rate:
        layer.e_score_correction_bias.copy_(torch.randn(layer.config.num_experts))
    return layer


def make_model(**changes):
    torch.manual_seed(0)
    return MiniMindForCausalLM(dataclasses.replace(TINY, initializer_range=0.1, **changes))


def tokens(*shape):
    return torch.randint(3, TINY.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def mix_plainly(layer, hidden_states):
    """A token at a time and an expert at a time, as MiniMind's classes define it."""
    config, outputs = layer.config, []
    for token in hidden_states.flatten(0, 1):
        logits = layer.gate.weight @ token
        scores = logits.softmax(-1) if config.scoring_func == "softmax" else logits.sigmoid()
        choice = scores if layer.e_score_correction_bias is None else scores + layer.e_score_correction_bias
        chosen = choice.argsort(descending=True)[: config.num_experts_per_tok].tolist()
        total = sum(scores[expert] for expert in chosen) if config.norm_topk_prob else 1
        output = 0
        for expert in chosen:
            gate, up = (layer.experts.gate_up_proj[expert] @ token).chunk(2)
            weight = config.routed_scaling_factor * scores[expert] / total
            output = output + weight * (layer.experts.down_proj[expert] @ (F.silu(gate) * up))
        if layer.shared_experts is not None:
            shared = layer.shared_experts
            gate, up = shared.gate_proj.weight @ token, shared.up_proj.weight @ token
            output = output + shared.down_proj.weight @ (F.silu(gate) * up)
        outputs.append(output)
    return torch.stack(outputs).view_as(hidden_states)


@pytest.mark.parametrize("name", MILLIONS)
def test_preset_has_its_published_counts(name):
    config = PRESETS[name]
    assert (round(config.num_params() / 1e6, 2), round(config.num_active_params() / 1e6, 2)) == MILLIONS[name]


def test_scaling_preset_has_many_small_experts():
    config = PRESETS["moe-64e"]
    assert (config.num_experts, config.num_experts_per_tok, config.n_shared_experts) == (64, 4, 1)
    assert config.num_params() > 8 * config.num_active_params()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_experts_per_tok": 1, "n_shared_experts": 0},
        {"num_experts_per_tok": 1, "norm_topk_prob": False},
        {"num_experts_per_tok": 3, "n_shared_experts": 2, "routed_scaling_factor": 2.5},
        {"scoring_func": "sigmoid", "router_bias_update_rate": 0.001, "routed_scaling_factor": 1.5},
        {"scoring_func": "sigmoid", "norm_topk_prob": False},
        {"num_experts": 1, "num_experts_per_tok": 1},
        {"num_experts": 3, "num_experts_per_tok": 3, "moe_intermediate_size": 50},
    ],
    ids=str,
)
def test_layer_is_the_plain_mixture(changes):
    layer = make_layer(**changes)
    hidden_states = torch.randn(2, 6, TINY.hidden_size, requires_grad=True)
    found, wanted = layer(hidden_states), mix_plainly(layer, hidden_states)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    probe, inputs = torch.randn_like(wanted), (hidden_states, *layer.parameters())
    found_grads = torch.autograd.grad(found, inputs, probe)
    wanted_grads = torch.autograd.grad(wanted, inputs, probe, allow_unused=True)
    for left, right in zip(found_grads, wanted_grads, strict=True):
        right = torch.zeros_like(left) if right is None else right
        assert (left - right).norm() <= 1e-4 * right.norm() + 1e-4


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"num_experts": 16, "num_experts_per_tok": 3}], ids=str)
def test_logits_are_those_of_hugging_face(changes):
    config = dataclasses.replace(PRESETS["minimind3-moe"], num_hidden_layers=2, moe_intermediate_size=640, **changes)
    torch.manual_seed(0)
    theirs = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.feed_forward_size,
            moe_intermediate_size=640,
            num_hidden_layers=2,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_size,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
            num_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            norm_topk_prob=True,
            decoder_sparse_step=1,
        )
    ).eval()
    ours = MiniMindForCausalLM(config).eval()
    ours.load_state_dict(theirs.state_dict())
    input_ids = tokens(2, 30)
    expected = theirs(input_ids).logits
    assert (ours(input_ids).logits - expected).abs().max() < 1e-4
    cache = KVCache(config, 2, 30)
    pieces = [ours(piece, cache=cache).logits for piece in input_ids.tensor_split((20, 28, 29), dim=1)]
    assert (torch.cat(pieces, dim=1) - expected).abs().max() < 1e-4


def balance_plainly(logits, config, batch_shape, bias=None):
    """The losses of one layer, in the words of their papers."""
    num_rows, seq_len = batch_shape
    _, experts = route(logits, config, bias)
    scores = logits.softmax(-1) if config.scoring_func == "softmax" else logits.sigmoid()
    scores = scores / scores.sum(-1, keepdim=True)
    rows = range(num_rows) if config.seq_aux else [slice(None)]
    losses = []
    for row in rows:
        own_scores = scores.view(num_rows, seq_len, -1)[row].reshape(-1, config.num_experts)
        own_experts = experts.view(num_rows, seq_len, -1)[row].flatten().tolist()
        shares = [own_experts.count(expert) / len(own_experts) for expert in range(config.num_experts)]
        losses.append(config.num_experts * sum(f * own_scores[:, expert].mean() for expert, f in enumerate(shares)))
    z_loss = sum(token.exp().sum().log() ** 2 for token in logits) / len(logits)
    return config.router_aux_loss_coef * sum(losses) / len(losses) + config.router_z_loss_coef * z_loss


@pytest.mark.parametrize("seq_aux", [False, True])
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_balance_follows_its_definition(seq_aux, scoring_func, with_bias):
    config = dataclasses.replace(
        TINY, seq_aux=seq_aux, scoring_func=scoring_func, router_aux_loss_coef=0.3, router_z_loss_coef=0.2
    )
    torch.manual_seed(0)
    logits = [torch.randn(3 * 5, config.num_experts, requires_grad=True) for _ in range(2)]
    biases = [torch.randn(config.num_experts) if with_bias else None for _ in range(2)]
    balance = router_aux_loss(logits, config, (3, 5), biases)
    wanted = sum(balance_plainly(layer, config, (3, 5), bias) for layer, bias in zip(logits, biases, strict=True))
    torch.testing.assert_close(balance.aux_loss, wanted)
    found_grads = torch.autograd.grad(balance.aux_loss, logits)
    for left, right in zip(found_grads, torch.autograd.grad(wanted, logits), strict=True):
        torch.testing.assert_close(left, right)
    for layer, bias, load in zip(logits, biases, balance.expert_load, strict=True):
        assert load.tolist() == route(layer, config, bias)[1].flatten().bincount(minlength=8).tolist()


def test_balanced_routers_cost_their_coefficient_and_collapsed_ones_more():
    config = dataclasses.replace(TINY, num_experts=4, num_experts_per_tok=1, router_aux_loss_coef=0.25)
    even = 9 * torch.eye(4).repeat(5, 1)
    assert router_aux_loss([even], config, (4, 5)).aux_loss.item() == pytest.approx(0.25)
    collapsed = torch.zeros(20, 4)
    collapsed[:, 2] = 50
    balance = router_aux_loss([even, collapsed], config, (4, 5))
    assert balance.aux_loss.item() == pytest.approx(0.25 + 4 * 0.25)
    assert balance.expert_load.tolist() == [[5, 5, 5, 5], [0, 0, 20, 0]]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_model_reports_the_balance_of_its_own_routers_once(checkpointing):
    model, input_ids = make_model(), tokens(2, 12)
    model.set_activation_checkpointing(checkpointing)
    seen = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _gate, _inputs, logits: seen.append(logits))
    output = model(input_ids, tokens(2, 12))
    wanted = router_aux_loss(seen, model.config, (2, 12))
    torch.testing.assert_close(output.aux_loss, wanted.aux_loss)
    assert output.expert_load.sum(dim=1).tolist() == [2 * 12 * 2] * 2
    assert torch.equal(output.expert_load, wanted.expert_load)
    gates = [layer.mlp.gate.weight for layer in model.model.layers]
    wanted_grads = torch.autograd.grad(wanted.aux_loss, gates, retain_graph=True)
    for left, right in zip(torch.autograd.grad(output.aux_loss, gates), wanted_grads, strict=True):
        torch.testing.assert_close(left, right)
    again = model(input_ids, tokens(2, 12))
    assert torch.equal(again.expert_load, output.expert_load)
    assert model(input_ids).aux_loss is None


def test_record_follows_the_routers_it_is_told_to_watch():
    model = make_model()
    other = copy.deepcopy(model)
    record = other.router_record
    assert [router.gate for router in record.routers] == [layer.mlp.gate for layer in other.model.layers]
    assert other(tokens(1, 4), tokens(1, 4)).expert_load.shape == (2, 8)
    record.watch([other.model.layers[1].mlp.router])
    assert other(tokens(1, 4), tokens(1, 4)).expert_load.shape == (1, 8)
    assert model(tokens(1, 4), tokens(1, 4)).expert_load.shape == (2, 8)
    missing = RouterRecord()
    missing.watch([model.model.layers[0].mlp.router])
    missing.start()
    with pytest.raises(RuntimeError, match="1 routers are watched, 0 gave logits"):
        missing.finish(model.config, (1, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_idle_experts_stay_in_the_graph_with_zero_gradients(dtype):
    layer = make_layer().to(dtype)
    hidden_states = torch.randn(1, 1, TINY.hidden_size, dtype=dtype)
    chosen = route(layer.gate(hidden_states.flatten(0, 1)), layer.config)[1].flatten().tolist()
    layer(hidden_states).square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()
    busy = layer.experts.down_proj.grad.abs().sum(dim=(1, 2)) > 0
    assert busy.nonzero().flatten().tolist() == sorted(chosen)


@torch.no_grad()
def test_one_token_reads_its_own_experts_alone():
    layer = make_layer()
    hidden_states = torch.randn(1, 1, TINY.hidden_size)
    expected = layer(hidden_states)
    chosen = route(layer.gate(hidden_states.flatten(0, 1)), layer.config)[1].flatten().tolist()
    idle = [expert for expert in range(8) if expert not in chosen]
    for weight in layer.experts.parameters():
        weight[idle] = float("nan")
    assert torch.equal(layer(hidden_states), expected)


def test_first_layers_stay_dense():
    model = make_model(first_k_dense_replace=1)
    assert not isinstance(model.model.layers[0].mlp, MoEFeedForward)
    assert isinstance(model.model.layers[1].mlp, MoEFeedForward)
    assert sum(parameter.numel() for parameter in model.parameters()) == model.config.num_params()
    assert model(tokens(1, 4), tokens(1, 4)).expert_load.shape == (1, 8)


@pytest.mark.parametrize("changes", [{}, {"scoring_func": "sigmoid", "router_bias_update_rate": 0.01}], ids=str)
def test_compiles_around_the_experts(changes):
    torch._dynamo.reset()
    model, input_ids, labels = make_model(num_hidden_layers=1, **changes), tokens(2, 12), tokens(2, 12)
    output = torch.compile(model, backend="aot_eager")(input_ids, labels)
    expected = model(input_ids, labels)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.aux_loss, expected.aux_loss)
    assert torch.equal(output.expert_load, expected.expert_load)
    parameters = list(model.parameters())
    wanted_grads = torch.autograd.grad(expected.loss + expected.aux_loss, parameters)
    for left, right in zip(torch.autograd.grad(output.loss + output.aux_loss, parameters), wanted_grads, strict=True):
        assert (left - right).norm() <= 1e-4 * right.norm()


def entropy_share(load):
    shares = load.float() / load.sum()
    return -(shares * shares.clamp(min=1e-9).log()).sum().item() / math.log(load.numel())


@pytest.mark.parametrize(
    ("changes", "balanced"),
    [
        ({"router_aux_loss_coef": 0.01}, True),
        ({"router_aux_loss_coef": 0.0, "scoring_func": "sigmoid", "router_bias_update_rate": 0.02}, True),
        ({"router_aux_loss_coef": 0.0}, False),
    ],
    ids=["auxiliary loss", "selection bias", "neither"],
)
def test_collapsed_router_recovers_with_a_balance_and_not_without(changes, balanced):
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, num_experts_per_tok=1, **changes)
    layer = MoEFeedForward(config)
    direction = F.normalize(torch.randn(config.hidden_size), dim=0)
    with torch.no_grad():
        layer.gate.weight[3] = direction
    optimizer = torch.optim.AdamW(layer.parameters(), lr=5e-3)
    loads = []
    for _ in range(100):
        hidden_states = torch.randn(2, 48, config.hidden_size) + 3 * direction
        logits = layer.gate(hidden_states.flatten(0, 1))
        balance = router_aux_loss([logits], config, (2, 48), [layer.router.bias])
        loss = (layer(hidden_states) - hidden_states).square().mean() + balance.aux_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if layer.router.bias is not None:
            step_bias(layer.router.bias, balance.expert_load[0], config.router_bias_update_rate)
        loads.append(balance.expert_load[0])
    assert entropy_share(loads[0]) < 0.3
    assert (entropy_share(sum(loads[-20:])) > 0.9) == balanced


def test_selection_bias_moves_against_the_load_and_survives_casts_and_files(tmp_path):
    model = make_model(scoring_func="sigmoid", router_bias_update_rate=0.001)
    load = torch.tensor([[10, 0, 4, 4, 4, 4, 4, 2]]).expand(2, 8)
    for _ in range(3):
        model.step_router_biases(load)
    expected = torch.tensor([-0.003, 0.003, 0, 0, 0, 0, 0, 0.003])
    torch.testing.assert_close(model.model.layers[1].mlp.e_score_correction_bias, expected)
    model.bfloat16()
    torch.testing.assert_close(model.model.layers[1].mlp.e_score_correction_bias, expected, rtol=0, atol=1e-9)
    model.save_pretrained(tmp_path)
    loaded = MiniMindForCausalLM.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert loaded.model.layers[0].mlp.e_score_correction_bias.dtype == torch.float32
    assert loaded(tokens(1, 6)).logits.isfinite().all()


def test_a_dense_model_has_no_balance():
    output = MiniMindForCausalLM(ModelConfig(vocab_size=50, hidden_size=64, num_hidden_layers=1))(
        torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)
    )
    assert output.aux_loss is None and output.expert_load is None


@pytest.mark.parametrize("device", [None, "cpu"], ids=["plain", "kernels"])
def test_frozen_experts_pass_the_gradient_on(device):
    layer = make_layer().requires_grad_(False)
    if device is not None:
        apply_kernels(layer, device)
    hidden_states = torch.randn(2, 5, TINY.hidden_size, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(hidden_states).sum(), hidden_states)
    wanted = torch.autograd.grad(mix_plainly(layer, hidden_states).sum(), hidden_states)[0]
    assert (grad - wanted).norm() <= 1e-4 * wanted.norm()
    with torch.no_grad():
        assert layer(hidden_states).grad_fn is None
