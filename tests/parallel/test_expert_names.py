"""Which part of the model's tensors an engine's parameter is."""

import pytest
import torch

from minimind.model import MiniMindForCausalLM, ModelConfig
from minimind.parallel.expert_names import EnginePart, find_part

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, use_moe=True,
    num_experts=4, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=24, first_k_dense_replace=1,
)  # fmt: skip
MLP = "model.layers.1.mlp."


def autoep_names():
    return [f"{MLP}router.gate.weight", *(f"{MLP}experts.{name}" for name in ("w1", "w2", "w3"))]


def native_names(num_local):
    experts = [
        f"{MLP}moe.deepspeed_moe.experts.deepspeed_experts.{local}.{name}_proj.weight"
        for local in range(num_local)
        for name in ("gate", "up", "down")
    ]
    return [f"{MLP}moe.deepspeed_moe.gate.wg.weight", *experts]


@pytest.mark.parametrize("ep_size", [1, 2, 4])
@pytest.mark.parametrize("native", [False, True])
def test_the_ranks_of_a_group_hold_every_element_once(ep_size, native):
    whole = {
        name: torch.zeros_like(tensor, dtype=torch.int64)
        for name, tensor in MiniMindForCausalLM(CONFIG).named_parameters()
        if name.startswith(MLP) and "shared" not in name
    }
    for rank in range(ep_size):
        names = native_names(CONFIG.num_experts // ep_size) if native else autoep_names()
        for name in names:
            part = find_part(name, CONFIG, ep_size, rank)
            whole[part.name][part.index] += 1 if part.index else rank == 0
    assert len(whole) == 3
    for name, count in whole.items():
        assert torch.equal(count, torch.ones_like(count)), name


def test_names_that_no_backend_changes_stand_for_themselves():
    for name in (
        "model.embed_tokens.weight",
        f"{MLP}shared_experts.up_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
    ):
        assert find_part(name, CONFIG, 2, 1) == EnginePart(name, ())
    for name in dict(MiniMindForCausalLM(CONFIG).named_parameters()):
        assert find_part(name, CONFIG) == EnginePart(name, ())
    bias = EnginePart(f"{MLP}e_score_correction_bias", ())
    assert find_part(f"{MLP}router.e_score_correction_bias", CONFIG, 2, 1) == bias
