"""The shape of a model: published counts, operation counts, and what is refused."""

import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minimind.errors import UserError
from minimind.model import PRESETS, MiniMindForCausalLM, ModelConfig

PUBLISHED_MILLIONS = {"minimind2-small": 25.83, "minimind2": 104.03, "minimind3": 63.91}
GROWTH_MILLIONS = {"small": 50, "medium": 200, "large": 1000}


@pytest.mark.parametrize("name", PRESETS)
def test_count_of_a_preset_is_that_of_its_modules(name):
    with torch.device("meta"):
        model = MiniMindForCausalLM(PRESETS[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == PRESETS[name].num_params()


@pytest.mark.parametrize("name", PUBLISHED_MILLIONS)
def test_preset_has_its_published_count(name):
    assert round(PRESETS[name].num_params() / 1e6, 2) == PUBLISHED_MILLIONS[name]


@pytest.mark.parametrize("name", GROWTH_MILLIONS)
def test_growth_size_is_near_its_name(name):
    assert PRESETS[name].num_params() / 1e6 == pytest.approx(GROWTH_MILLIONS[name], rel=0.02)


def test_small_presets_are_small():
    assert PRESETS["tiny"].num_params() < 1e6
    assert PRESETS["quickstart"].num_params() / 1e6 == pytest.approx(5, rel=0.02)


@pytest.mark.parametrize("tied", [True, False])
def test_untied_and_unusual_shapes_are_counted(tied):
    config = ModelConfig(
        vocab_size=99,
        hidden_size=40,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=1,
        head_dim=10,
        intermediate_size=56,
        qk_norm=tied,
        tie_word_embeddings=tied,
        attention_bias=not tied,
    )
    model = MiniMindForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == config.num_params()


def test_residual_experts_are_counted():
    config = dataclasses.replace(PRESETS["tiny-moe"], moe_residual=True, first_k_dense_replace=1)
    model = MiniMindForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == config.num_params()
    unused = config.num_experts - config.num_experts_per_tok
    idle = 3 * unused * 3 * config.hidden_size * config.expert_feed_forward_size
    assert config.num_active_params() == config.num_params() - idle


def test_flops_are_those_of_the_real_products():
    # Without the fused kernels every product is a plain one and is counted; it works on all keys, causal or not.
    config = dataclasses.replace(PRESETS["tiny"], flash_attn=False)
    model, batch_size, seq_len = MiniMindForCausalLM(config), 2, 24
    input_ids = torch.randint(0, config.vocab_size, (batch_size, seq_len))
    with FlopCounterMode(display=False) as counter:
        model(input_ids).logits.sum().backward()
    width = config.num_hidden_layers * config.num_attention_heads * config.head_size
    on_all_keys = 3 * width * 4 * seq_len
    on_visible_keys = 3 * width * 4 * sum(range(1, seq_len + 1)) / seq_len
    expected = config.flops_per_token(seq_len) - on_visible_keys + on_all_keys
    assert counter.get_total_flops() == expected * batch_size * seq_len


def test_dict_and_json_round_trip():
    for config in PRESETS.values():
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hiden_size": 64}, ("hiden_size", "hidden_size")),
        ({"hidden_size": "64"}, ("hidden_size", "'64'")),
        ({"qk_norm": 1}, ("qk_norm", "1")),
        ({"num_hidden_layers": 2.5}, ("num_hidden_layers", "2.5")),
    ],
)
def test_a_bad_mapping_names_the_field(values, words):
    with pytest.raises(UserError) as caught:
        ModelConfig.from_dict(values)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": 0},
        {"hidden_size": 770},
        {"hidden_size": 24, "num_attention_heads": 8, "num_key_value_heads": 8},
        {"head_dim": 33},
        {"num_key_value_heads": 3},
        {"dropout": 1.0},
        {"attention_dropout": -0.1},
        {"rms_norm_eps": float("nan")},
        {"rope_scaling_factor": 0.5},
        {"rope_beta_fast": 1.0},
        {"rope_attention_factor": 1.2},
        {"rope_attention_factor": 1.2, "rope_scaling_factor": 2.0, "rope_scaling_type": "llama3"},
        {"rope_scaling_type": "linear"},
        {"rope_theta": 1.0},
        {"rope_original_max_position_embeddings": 0},
        {"num_hidden_layers": 10_000_000},
        {"vocab_size": 10**20},
        {"hidden_size": 8 * 10**15},
        {"eos_token_id": 6400},
        {"num_experts": 8},
        {"n_shared_experts": 1},
        {"moe_residual": True},
        {"use_moe": True, "num_experts_per_tok": 5},
        {"use_moe": True, "scoring_func": "relu"},
        {"use_moe": True, "first_k_dense_replace": 8},
        {"use_moe": True, "router_aux_loss_coef": -1.0},
    ],
)
def test_an_impossible_value_is_refused_by_name(values):
    with pytest.raises(UserError) as caught:
        ModelConfig(**values)
    named = list(values)[-1] if "use_moe" in values else next(iter(values))
    assert f"{named}: {values[named]!r} " in str(caught.value)


def test_defaults_follow_other_fields():
    config = ModelConfig(hidden_size=512, num_attention_heads=8)
    assert (config.head_size, config.feed_forward_size) == (64, 1664)
    assert config.head_dim is None and config.intermediate_size is None
    assert ModelConfig(head_dim=32).head_size == 32
