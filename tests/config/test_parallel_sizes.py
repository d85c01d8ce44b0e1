"""Ranks that share sequences, in the run and in the JSON: what is agreed on, and what is refused."""

import pytest

from minimind.config.resolve import resolve_run
from minimind.config.run_config import DataConfig, RunConfig, TrainConfig
from minimind.errors import UserError
from minimind.model.config import ModelConfig

HEADS = {"hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 2}
EXPERTS = {**HEADS, "use_moe": True, "num_experts": 4}


def resolve(ds=None, *, world_size=4, seq_len=48, model=None, **train):
    run = RunConfig(
        ModelConfig(**{**HEADS, **(model or {})}),
        DataConfig(seq_len=seq_len),
        TrainConfig(micro_batch_size=2, optimizer="adamw", **train),
    )
    return resolve_run(run, ds or {}, world_size=world_size, local_world_size=world_size)


@pytest.mark.parametrize(
    ("ours", "theirs", "size"), [(2, None, 2), (None, 2, 2), (2, 2, 2), (2, "auto", 2), (None, "auto", 1), (None, 0, 1)]
)
def test_the_run_and_the_json_agree(ours, theirs, size):
    resolved = resolve({} if theirs is None else {"sequence_parallel_size": theirs}, sp_size=ours)
    assert resolved.train.sp_size == size and resolved.dp_size == 4 // size
    assert (resolved.world_size, resolved.num_averaging) == (4, 4)
    assert resolved.train.global_batch_size == 2 * 4 // size
    assert "sequence_parallel_size" not in resolved.ds, "DeepSpeed's data-parallel group would stay the world"
    assert resolve(resolved.ds, **{"sp_size": resolved.run.train.sp_size}).train == resolved.train


def test_experts_and_hpz_divide_all_ranks_that_average():
    hpz = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "auto"}}
    assert resolve(hpz, sp_size=2).zero.hpz_partition_size == 4
    assert resolve(sp_size=2, ep_size=4, model=EXPERTS).train.ep_size == 4


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"ds": {"sequence_parallel_size": 4}, "sp_size": 2},
            "sp_size is 2 in the run and 4 as sequence_parallel_size",
        ),
        ({"ds": {"sequence_parallel_size": "two"}}, "sp_size"),
        ({"sp_size": 3}, "sp_size: 3 does not divide 4 ranks; possible: 1, 2, 4"),
        ({"sp_size": 4, "seq_len": 50}, "sp_size: 4 does not divide seq_len 50; possible: 1, 2"),
        # 12 query heads can be shared by 8 ranks in no even way, and 9 that read 3 by two ranks neither.
        (
            {"sp_size": 8, "world_size": 8},
            "sp_size: 8 ranks cannot share 12 query heads that read 2 key-value heads; possible: 1, 2, 4",
        ),
        (
            {"sp_size": 2, "model": {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3}},
            "sp_size: 2 ranks cannot share 9 query heads that read 3 key-value heads; possible: 1",
        ),
        ({"sp_size": 2, "model": {**EXPERTS, "seq_aux": True, "router_aux_loss_coef": 0.1}}, "seq_aux: True balances"),
        (
            {"sp_size": 2, "model": {**EXPERTS, "aux_loss_scope": "micro", "router_aux_loss_coef": 0.1}},
            "aux_loss_scope: micro balances the experts of whole rows",
        ),
        (
            {"sp_size": 2, "model": EXPERTS, "moe_backend": "deepspeed", "moe_drop_tokens": True},
            "moe_drop_tokens: an expert's capacity counts whole rows",
        ),
    ],
)
def test_what_cannot_be_shared_is_one_line_with_what_can(given, words):
    with pytest.raises(UserError) as error:
        resolve(given.pop("ds", None), **given)
    assert words in str(error.value) and "\n" not in str(error.value)
