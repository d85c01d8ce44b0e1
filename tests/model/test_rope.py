"""Rotary positions and YaRN against their definition and against transformers' own."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from minimind.model import PRESETS, MiniMindForCausalLM, ModelConfig
from minimind.model.rope import attention_factor, inverse_frequencies, rotary_tables, rotate


def test_rotation_turns_pairs_by_their_angle():
    config = ModelConfig(hidden_size=16, num_attention_heads=2, num_key_value_heads=2, rope_theta=100.0)
    x = torch.randn(1, 5, 2, 8)
    positions = torch.tensor([0, 1, 7, 100, 30000])
    rotated = rotate(x, *rotary_tables(config, positions))
    for t, position in enumerate(positions.tolist()):
        for pair in range(4):
            angle = position * 100.0 ** (-2 * pair / 8)
            as_complex = complex(math.cos(angle), math.sin(angle)) * complex(x[0, t, 1, pair], x[0, t, 1, pair + 4])
            assert rotated[0, t, 1, pair].item() == pytest.approx(as_complex.real, abs=1e-5)
            assert rotated[0, t, 1, pair + 4].item() == pytest.approx(as_complex.imag, abs=1e-5)


def test_scores_depend_on_distance_alone():
    config = PRESETS["tiny"]
    query, key = torch.randn(2, 1, 1, 1, config.head_size)

    def score(at):
        tables = [rotary_tables(config, torch.tensor([position])) for position in at]
        return (rotate(query, *tables[0]) * rotate(key, *tables[1])).sum().item()

    assert score((3, 1)) == pytest.approx(score((20003, 20001)), abs=1e-4)


@pytest.mark.parametrize("factor", [1.5, 4.0, 16.0])
@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_yarn_is_that_of_transformers(factor, theta, scale):
    ours = ModelConfig(
        rope_scaling_factor=factor, rope_theta=theta, rope_attention_factor=scale,
        rope_original_max_position_embeddings=2048,
    )  # fmt: skip
    parameters = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": 2048,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": scale,
    }
    theirs = LlamaConfig(
        hidden_size=768,
        num_attention_heads=8,
        max_position_embeddings=int(2048 * factor),
        rope_parameters={name: value for name, value in parameters.items() if value is not None},
    )
    frequencies, their_factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
    torch.testing.assert_close(inverse_frequencies(ours).float(), frequencies, rtol=1e-6, atol=0)
    assert attention_factor(ours) == pytest.approx(their_factor)
    cos, sin = rotary_tables(ours, torch.arange(4))
    torch.testing.assert_close((cos**2 + sin**2), torch.full_like(cos, their_factor**2))


@pytest.mark.parametrize(("kind", "trained"), [("llama3", 8192), ("llama3", 64), ("linear", 512)])
def test_other_ways_of_stretching_are_those_of_transformers(kind, trained):
    ours = ModelConfig(
        rope_scaling_type=kind, rope_scaling_factor=8.0, rope_theta=5e5, rope_beta_fast=4.0, rope_beta_slow=1.0,
        rope_original_max_position_embeddings=trained,
    )  # fmt: skip
    parameters = {"rope_type": kind, "rope_theta": 5e5, "factor": 8.0}
    if kind == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": trained}
    theirs = LlamaConfig(
        hidden_size=768, num_attention_heads=8, max_position_embeddings=8 * trained, rope_parameters=parameters
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"))
    torch.testing.assert_close(inverse_frequencies(ours).float(), frequencies, rtol=1e-6, atol=0)
    assert attention_factor(ours) == factor == 1


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones():
    plain, yarn = inverse_frequencies(ModelConfig()), inverse_frequencies(ModelConfig(rope_scaling_factor=8.0))
    ratio = plain / yarn
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(8)
    assert (ratio.diff() >= -1e-9).all() and ((ratio > 1.01) & (ratio < 7.9)).any()


def test_a_cast_of_the_model_leaves_the_tables_exact():
    config = PRESETS["tiny"]
    model = MiniMindForCausalLM(config).bfloat16()
    assert not list(model.buffers())
    cos, _ = rotary_tables(config, torch.tensor([400]))
    frequencies = config.rope_theta ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos[0, 0, :8].double(), (400 * frequencies).cos(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("changes", [{}, {"rope_scaling_factor": 32.0}, {"rope_theta": 1e8}])
def test_positions_near_a_million_are_exact(changes):
    config = ModelConfig(max_position_embeddings=2**20, **changes)
    positions = torch.tensor([0, 1, 32_767, 999_999, 2**20 - 1])
    cos, sin = rotary_tables(config, positions)
    frequencies, scale = inverse_frequencies(config).tolist(), attention_factor(config)
    half = config.head_size // 2
    for row, position in enumerate(positions.tolist()):
        angles = [position * frequency for frequency in frequencies]
        expected = torch.tensor([[scale * math.cos(a) for a in angles], [scale * math.sin(a) for a in angles]])
        torch.testing.assert_close(torch.stack([cos[row, 0, half:], sin[row, 0, half:]]), expected, rtol=0, atol=3e-7)
