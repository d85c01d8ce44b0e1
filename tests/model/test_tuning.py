"""What a run trains, by arithmetic, is what the real modules have; adapters compute what the merged matrix does."""

import dataclasses
import math

import pytest
import torch
from pytest import approx
from torch.utils.flop_counter import FlopCounterMode

from minimind.model import PRESETS, MiniMindForCausalLM
from minimind.model.kernels.apply import apply_kernels
from minimind.model.lora import add_adapters, merge, train_only
from minimind.model.tuning import (
    LoRA,
    adapters_of,
    count,
    parameter_shapes,
    trained_shapes,
    training_flops_per_token,
)

TINY = PRESETS["tiny"]
MOE = dataclasses.replace(PRESETS["tiny-moe"], first_k_dense_replace=1, moe_residual=True)
SHAPES = {
    **PRESETS,
    "untied": dataclasses.replace(TINY, tie_word_embeddings=False, qk_norm=False, attention_bias=True),
    "residual experts": MOE,
    "no shared expert": dataclasses.replace(MOE, n_shared_experts=0),
}
LORA = LoRA(rank=4, alpha=8.0)


def shapes_of(model):
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", SHAPES)
def test_names_and_shapes_are_those_of_the_modules(name):
    config = SHAPES[name]
    with torch.device("meta"):
        model = MiniMindForCausalLM(config)
    own = shapes_of(model)
    assert parameter_shapes(config) == own and count(own) == config.num_params()
    assert training_flops_per_token(config, 100, own) == config.flops_per_token(100)
    with torch.device("meta"):
        add_adapters(model, LORA)
    adapters = {name: shape for name, shape in shapes_of(model).items() if name not in own}
    assert trained_shapes(config, LORA) == adapters and len(adapters) >= 2 * 4 * config.num_hidden_layers
    assert not any("experts.gate_up" in name or "embed" in name or "norm" in name for name in adapters)


def make(config=TINY, targets=LORA.targets):
    torch.manual_seed(0)
    model = MiniMindForCausalLM(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora = dataclasses.replace(LORA, targets=targets)
    add_adapters(model, lora)
    trained = trained_shapes(config, lora)
    train_only(model, trained)
    return model, lora, trained, before


@pytest.mark.parametrize("config", [TINY, MOE], ids=["dense", "experts"])
def test_adapters_change_nothing_until_trained_and_then_what_the_merged_matrices_do(config):
    model, lora, trained, before = make(config, (*LORA.targets, "experts"))
    assert sum(len(shape) == 3 for shape in trained.values()) == 4 * config.num_moe_layers
    plain = MiniMindForCausalLM(config)
    plain.load_state_dict(before)
    tokens = torch.randint(0, config.vocab_size, (2, 24))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, plain(tokens).logits)
        for name in trained:
            model.get_parameter(name).normal_(0, 0.1)
        for name, weight in before.items():
            if lora.has(name):
                first, second = map(model.get_parameter, adapters_of(name))
                expected = weight.double() + lora.scale * second.double() @ first.double()
                merged = merge(weight, first, second, lora.scale)
                assert merged.double() == approx(expected, abs=1e-6)
                plain.get_parameter(name).copy_(merged)
        logits = plain(tokens).logits
        assert model(tokens).logits == approx(logits, abs=1e-5 * float(logits.abs().max()))
        apply_kernels(model, "cpu")
        assert model(tokens).logits == approx(logits, abs=1e-5 * float(logits.abs().max()))


def test_the_flops_are_those_of_the_real_products():
    config, batch_size, seq_len = dataclasses.replace(TINY, flash_attn=False), 2, 24
    width = config.num_hidden_layers * config.num_attention_heads * config.head_size
    causal = 3 * width * 4 * (seq_len - sum(range(1, seq_len + 1)) / seq_len)
    tokens = torch.randint(0, config.vocab_size, (batch_size, seq_len))

    def measure(model):
        # The first trained block's input gets a gradient, as under ZeRO-3.
        model.model.embed_tokens.register_forward_hook(lambda *found: found[2].requires_grad_())
        with FlopCounterMode(display=False) as counter:
            model(tokens).logits.sum().backward()
        return counter.get_total_flops() / tokens.numel()

    for targets in (LORA.targets, ("q", "v"), ("down",)):
        model, _, trained, before = make(config, targets)
        assert measure(model) == training_flops_per_token(config, seq_len, trained) + causal
        frozen = [parameter.grad for name, parameter in model.named_parameters() if name not in trained]
        assert len(frozen) == len(before) - 1 and not any(grad is not None for grad in frozen)  # a tied one twice
    last = config.num_hidden_layers - 1
    trained = trained_shapes(config, freeze=rf"embed|norm|layers\.(?!{last}\.)")
    model = MiniMindForCausalLM(config)
    train_only(model, trained)
    model.model.layers[last].register_forward_pre_hook(lambda _, inputs: (inputs[0].requires_grad_(), *inputs[1:]))
    with FlopCounterMode(display=False) as counter:
        model(tokens).logits.sum().backward()
    found = counter.get_total_flops() / tokens.numel()
    # Of the blocks below, the forward alone.
    below = (config.num_hidden_layers - 1) / config.num_hidden_layers * causal * 2 / 3
    assert found == approx(training_flops_per_token(config, seq_len, trained) + causal - below)


def test_a_pattern_is_searched_for_in_names():
    left = trained_shapes(TINY, freeze=r"embed_tokens|layers\.[01]\.")
    assert "model.norm.weight" in left and "model.embed_tokens.weight" not in left
    assert not any(name.startswith(("model.layers.0.", "model.layers.1.")) for name in left)
    assert trained_shapes(TINY) == parameter_shapes(TINY)
    assert count(trained_shapes(TINY, LORA)) == sum(
        LORA.rank * sum(shape) for name, shape in parameter_shapes(TINY).items() if LORA.has(name)
    )
    assert math.isclose(LORA.scale, 2.0)
