"""Configs of the Hugging Face tools: what our models are called there, what of theirs is ours, and what is refused."""

import dataclasses

import pytest

from minimind.checkpoints.formats.huggingface_config import choose_architecture, from_huggingface, to_huggingface
from minimind.errors import UserError
from minimind.model import PRESETS, ModelConfig

TINY_MOE = PRESETS["tiny-moe"]
ARCHITECTURES = {
    "tiny": "qwen3",
    "minimind3": "qwen3",
    "minimind2-small": "llama",
    "minimind2": "llama",
    "minimind3-moe": "qwen3_moe",
    "minimind2-moe": "ernie4_5_moe",
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_published_model_has_an_architecture(name):
    assert choose_architecture(PRESETS[name]) == ARCHITECTURES[name]
    assert from_huggingface(to_huggingface(PRESETS[name])) == PRESETS[name]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "n_shared_experts=1 with a softmax router and qk_norm"),
        ({"attention_bias": True}, "attention_bias with qk_norm"),
        ({"attention_bias": True, "qk_norm": False}, "attention_bias with experts"),
        ({"n_shared_experts": 0, "router_bias_update_rate": 0.1}, "a selection bias"),
        ({"routed_scaling_factor": 2.0}, "routed_scaling_factor=2.0"),
        ({"n_shared_experts": 0, "moe_residual": True}, "moe_residual"),
        ({"scoring_func": "sigmoid", "n_shared_experts": 0}, "a sigmoid router without shared experts"),
        ({"qk_norm": False, "norm_topk_prob": False, "n_shared_experts": 0}, "norm_topk_prob=false"),
        ({"qk_norm": False, "n_shared_experts": 0, "rope_scaling_factor": 2.0}, "scaled positions"),
    ],
)
def test_what_no_architecture_computes_is_refused_with_the_reason(changes, reason):
    with pytest.raises(UserError, match=reason) as caught:
        to_huggingface(dataclasses.replace(TINY_MOE, **changes))
    assert "--format minimind" in str(caught.value)


def foreign(**changes) -> dict:
    """A small Qwen3 as others write it."""
    values = {
        "model_type": "qwen3",
        "vocab_size": 400,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rope_theta": 1e6,
        "eos_token_id": [5, 6],
        "unknown_to_us": True,
    }
    return {**values, **changes}


def test_a_foreign_config_is_read():
    config = from_huggingface(foreign())
    assert config == ModelConfig(
        vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, eos_token_id=5, tie_word_embeddings=False,
        rope_original_max_position_embeddings=32768,
    )  # fmt: skip
    llama = from_huggingface(foreign(model_type="llama", head_dim=None, num_key_value_heads=None))
    assert not llama.qk_norm and llama.head_size == 16 and llama.num_key_value_heads == 4
    assert from_huggingface(foreign(rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 5e5}))


def test_foreign_experts_are_read():
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    config = from_huggingface(foreign(model_type="qwen3_moe", mlp_only_layers=[0], **experts))
    assert config.use_moe and config.first_k_dense_replace == 1 and config.expert_feed_forward_size == 32
    assert (config.num_experts, config.num_experts_per_tok, config.norm_topk_prob) == (8, 2, True)
    with pytest.raises(UserError, match=r"mlp_only_layers \[1\]"):
        from_huggingface(foreign(model_type="qwen3_moe", mlp_only_layers=[1], **experts))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gemma"}, "'gemma' is not one of llama, mistral, qwen2, qwen3, qwen3_moe"),
        ({"model_type": ["llama"]}, "is not one of"),
        ({"model_type": "mistral"}, "sliding_window 4096"),
        ({"model_type": "mistral", "sliding_window": 64}, "sliding_window 64"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"layer_types": 5}, "layer_types with 5"),
        ({"rope_scaling": "yarn"}, "rope_scaling: 'yarn' is not an object"),
        ({"rope_parameters": [1]}, "rope_parameters: .* is not an object"),
        ({"rope_scaling": {"type": "yarn"}}, "'yarn' have no factor"),
        ({"rope_scaling": {"type": "yarn", "factor": "four"}}, "rope_scaling_factor: 'four'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": []}}, "rope_beta_fast"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rotary positions of type"),
        ({"rope_theta": 1}, "rope_theta: 1.0 is not a finite number above 1"),
        ({"rope_theta": "10000"}, "rope_theta: '10000'"),
        ({"vocab_size": 10**20}, "vocab_size: 100000000000000000000 gives a model of"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers: 10000000 is not a number from 1 to 10000"),
        ({"num_attention_heads": [4]}, "num_"),
        ({"eos_token_id": []}, "eos_token_id"),
        ({"model_type": "qwen3_moe", "num_experts": 10**8}, "num_experts: 100000000 is not"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": 5}, "mlp_only_layers 5"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": ["a", 0]}, "mlp_only_layers"),
        ({"minimind": {"hidden_size": "x"}}, "hidden_size: 'x'"),
        ({"model_type": "ernie4_5_moe"}, "'ernie4_5_moe' is not one of"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["sliding_attention"]}, "sliding_attention"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' have no high_freq_factor"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size"),
    ],
)
def test_what_our_model_has_not_is_refused(changes, said):
    with pytest.raises(UserError, match=said):
        from_huggingface(foreign(**changes))


def test_an_edited_export_counts_as_it_stands():
    values = to_huggingface(dataclasses.replace(PRESETS["tiny"], dropout=0.1))
    assert from_huggingface(values).dropout == 0.1
    edited = from_huggingface({**values, "rms_norm_eps": 1e-3})
    assert edited.rms_norm_eps == 1e-3 and edited.dropout == 0.0
