"""The backend, the block that AutoEP reads, and what is refused before anything is started."""

import dataclasses

import pytest
from expert_runs import DENSE, EXPERTS, resolve

from minimind.config.expert_parallel import autoep_block
from minimind.config.resolve import resolve_run
from minimind.config.run_config import DataConfig, RunConfig, TrainConfig
from minimind.errors import UserError
from minimind.model import ModelConfig

SIGMOID = {**EXPERTS, "scoring_func": "sigmoid", "routed_scaling_factor": 2.5, "norm_topk_prob": False}


def refused(words, *args, **kwargs):
    with pytest.raises(UserError) as error:
        resolve(*args, **kwargs)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), error.value


def test_experts_go_to_autoep_by_default_on_one_rank_too():
    for world_size in (1, 2):
        resolved = resolve(1, world_size, EXPERTS)
        assert (resolved.train.moe_backend, resolved.train.ep_size) == ("autoep", 1)
        assert resolved.ds["expert_parallel"] == autoep_block(resolved.model, 1)


def test_a_dense_model_and_deepspeed_moe_have_no_block():
    for model, train in ((DENSE, {}), (EXPERTS, {"moe_backend": "deepspeed"})):
        for block in ({}, {"enabled": "auto"}, {"enabled": False}):
            resolved = resolve(1, 1, model, {"expert_parallel": block} if block else None, **train)
            assert "expert_parallel" not in resolved.ds
            assert resolved.train.moe_backend == train.get("moe_backend")


@pytest.mark.parametrize(("precision", "size", "better"), [("bf16", 100, 104), ("fp32", 98, 100)])
def test_sizes_that_the_product_of_a_gpu_does_not_take_are_one_line(precision, size, better):
    run = RunConfig(
        ModelConfig(**{**EXPERTS, "moe_intermediate_size": size}),
        DataConfig(seq_len=16),
        TrainConfig(precision=precision, micro_batch_size=1),
    )
    resolve_run(run, {}, world_size=1, device_type="cpu")
    with pytest.raises(UserError, match=f"moe_intermediate_size: {size} is no multiple of .* take {better}"):
        resolve_run(run, {}, world_size=1, device_type="cuda")


def test_the_block_follows_the_model():
    block = resolve(1, 2, SIGMOID, ep_size=2).ds["expert_parallel"]
    assert block["autoep_size"] == 2 and block["score_func"] == "sigmoid" and block["top_k"] == 2
    assert block["routed_scaling_factor"] == 2.5 and block["route_norm"] is False and block["score_apply"] == "post"
    assert block["use_grouped_mm"] is True
    odd = dataclasses.replace(ModelConfig(**EXPERTS), moe_intermediate_size=30)
    assert autoep_block(odd, 1)["use_grouped_mm"] is False, "torch's grouped product wants rows of 16 bytes"


def test_what_the_json_says_is_taken_or_must_agree():
    ds = {"expert_parallel": {"enabled": True, "autoep_size": 2, "combine_impl": "legacy_bmm", "top_k": "auto"}}
    resolved = resolve(1, 2, EXPERTS, ds)
    assert resolved.train.ep_size == 2
    assert resolved.ds["expert_parallel"] == {**autoep_block(resolved.model, 2), "combine_impl": "legacy_bmm"}
    whole = {"expert_parallel": autoep_block(ModelConfig(**SIGMOID), 1)}
    assert resolve(1, 2, SIGMOID, whole, ep_size=1).ds["expert_parallel"] == whole["expert_parallel"]
    wrong = {"expert_parallel": {"autoep_size": 4, "top_k": 1, "score_func": "sigmoid", "expert_w3": "up_proj"}}
    refused(
        [
            "ep_size is 2 in the run and 4 as expert_parallel.autoep_size",
            "top_k is 2 in the run and 1 as expert_parallel.top_k",
            "score_func is softmax in the run and sigmoid",
            "expert_w3 is null in the run and up_proj",
        ],
        1, 2, EXPERTS, wrong, ep_size=2,
    )  # fmt: skip
    refused(["moe_backend is autoep", "off"], 1, 1, EXPERTS, {"expert_parallel": {"enabled": False}})
    refused(
        ["moe_backend is deepspeed"], 1, 1, EXPERTS, {"expert_parallel": {"enabled": True}}, moe_backend="deepspeed"
    )


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"autoep_sizes": 2}, ["unknown field 'autoep_sizes'", "autoep_size"]),
        ({"load_balance_coeff": 0.01}, ["load_balance_coeff is not used", "router_aux_loss_coef"]),
        ({"preset_model": "mixtral"}, ["preset_model is not used"]),
        ({"enabled": "yes"}, ["enabled: 'yes' is not"]),
        ({"autoep_size": 0}, ["autoep_size: 0 is not"]),
    ],
)
def test_a_wrong_block_is_one_line(block, words):
    refused(words, 1, 1, EXPERTS, {"expert_parallel": block})


@pytest.mark.parametrize(
    ("stage", "model", "train", "words"),
    [
        (1, EXPERTS, {"ep_size": 3}, ["ep_size: 3", "8 experts", "possible: 1, 2"]),
        (1, EXPERTS, {"ep_size": 4}, ["ep_size: 4", "2 ranks", "possible: 1, 2"]),
        (3, EXPERTS, {"moe_backend": "deepspeed"}, ["ZeRO stage 3", "autoep"]),
        (1, DENSE, {"ep_size": 2}, ["ep_size: 2", "dense"]),
        (1, DENSE, {"moe_backend": "autoep"}, ["moe_backend: autoep", "dense"]),
        (1, DENSE, {"moe_drop_tokens": True}, ["moe_drop_tokens: True", "dense"]),
        (1, EXPERTS, {"moe_drop_tokens": True}, ["moe_drop_tokens: AutoEP", "deepspeed"]),
        (1, EXPERTS, {"moe_gate_noise": "jitter"}, ["moe_gate_noise: AutoEP"]),
        (1, EXPERTS, {"moe_backend": "deepspeed", "moe_capacity_factor": 2.0}, ["moe_capacity_factor: 2.0", "drop"]),
        (1, EXPERTS, {"moe_backend": "deepspeed", "moe_gate_noise": "rsample"}, ["rsample", "one expert a token"]),
        (
            1, {**EXPERTS, "num_experts_per_tok": 3}, {"moe_backend": "deepspeed", "moe_sample_second": True},
            ["moe_sample_second", "num_experts_per_tok is 3"],
        ),
        (
            1, EXPERTS, {"moe_backend": "deepspeed", "moe_drop_tokens": True, "moe_random_selection": True},
            ["moe_random_selection", "num_experts_per_tok is 2"],
        ),
        (
            1, EXPERTS, {"moe_backend": "deepspeed", "moe_drop_tokens": True, "moe_min_capacity": 17},
            ["moe_min_capacity: 17", "seq_len 16"],
        ),
        (1, {**EXPERTS, "router_bias_update_rate": 0.1}, {"moe_backend": "deepspeed"}, ["router_bias_update_rate"]),
    ],
)  # fmt: skip
def test_combinations_that_cannot_work_are_one_line(stage, model, train, words):
    refused(words, stage, 2, model, **train)


@pytest.mark.parametrize(
    ("stage", "zero", "word"),
    [
        (3, {"zero_hpz_partition_size": 2}, "zero_hpz_partition_size"),
        (3, {"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}, "nvme"),
        (2, {"contiguous_gradients": False}, "contiguous_gradients"),
        (1, {"reduce_scatter": False}, "reduce_scatter"),
    ],
)
def test_zero_settings_that_deepspeed_refuses_with_experts(stage, zero, word):
    ds = {"zero_optimization": {"stage": stage, **zero}}
    resolve(stage, 2, DENSE, ds)
    refused([word], stage, 2, EXPERTS, ds)


def test_more_experts_a_token_than_there_are():
    with pytest.raises(UserError, match="num_experts_per_tok: 9 is above num_experts=8"):
        ModelConfig(**{**EXPERTS, "num_experts_per_tok": 9})
