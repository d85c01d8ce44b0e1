"""Ranks that share layers compute what one process computes, in every ZeRO stage, and each trap of AutoTP is closed."""

import re
import unittest.mock
from typing import Any

import pytest
import torch
from deepspeed.runtime.utils import is_model_parallel_parameter
from engine_runs import MODEL
from expert_runs import EXPERTS
from sequence_runs import resolve, train_plainly, walk
from training_runs import RankPool, rank_pool

from minimind.config import tensor_parallel
from minimind.config.resolve import resolve_run
from minimind.config.tensor_parallel import COLUMNS, ROWS, SUMMED, WHOLE, autotp_block, possible_tp_sizes
from minimind.errors import UserError
from minimind.model import ModelConfig
from minimind.model.attention import Attention
from minimind.model.tuning import parameter_shapes
from minimind.parallel.tensor_parallel import draw_apart

COUNT = 10
STAGES = (0, 1, 2, 3)
# Weights that start large, so that a gradient which is wrong is seen in the losses.
DENSE = {"initializer_range": 0.1}
UNTIED = {**DENSE, "tie_word_embeddings": False, "attention_bias": True}
HPZ = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}
WITH_EXPERTS = {**EXPERTS, "aux_loss_scope": "global"}


def cells_of(stages=STAGES, model: dict[str, Any] = DENSE, ds: dict[str, Any] | None = None, **train: Any) -> list:
    return [({"tp_size": 2, **train}, {**(ds or {}), "zero_optimization": {"stage": stage}}, model) for stage in stages]


@pytest.fixture(scope="module")
def pool():
    yield from rank_pool(2)


@pytest.fixture(scope="module")
def pool_of_four():
    yield from rank_pool(4)


@pytest.fixture(scope="module")
def plain():
    """The curves of one process, by model."""
    return {name: train_plainly(model, COUNT) for name, model in (("dense", DENSE), ("untied", UNTIED))}


def differences(found, expected) -> tuple[float, float]:
    """The largest of the losses, and of the norms in proportion."""
    losses, norms = (torch.tensor(found[i]) - torch.tensor(expected[i]) for i in (0, 1))
    return float(losses.abs().max()), float((norms / torch.tensor(expected[1])).abs().max())


def assert_same(pool: RankPool, cells: list, expected, count: int = COUNT) -> None:
    for curves in pool.run(walk, cells, count):
        for cell, curve in zip(cells, curves, strict=True):
            loss, norm = differences(curve, expected)
            assert loss < 1e-4 and norm < 1e-3, (cell, loss, norm)


def test_two_ranks(pool, plain):
    assert_same(pool, cells_of(), plain["dense"])
    assert_same(pool, cells_of((1, 3), UNTIED, activation_checkpointing=True), plain["untied"])
    assert_same(pool, cells_of((2,), ds={"tensor_parallel": {"tp_overlap_comm": True}}), plain["dense"])


def test_four_ranks(pool_of_four, plain):
    assert_same(pool_of_four, cells_of(), plain["dense"])
    assert_same(pool_of_four, cells_of(sp_size=2), plain["dense"])


def test_muon_takes_whole_matrices(pool, pool_of_four):
    """Of a matrix that a tensor group shares, put together from its parts, in every stage: what ranks that share
    nothing make of it."""
    muon = {"optimizer": "muon", "muon_lr": 0.02}
    expected = pool.run(walk, [({"tp_size": 1, **muon}, {}, UNTIED)], 4)[0][0]
    assert_same(pool, cells_of((0, 2), UNTIED, **muon), expected, 4)
    assert_same(pool_of_four, cells_of((1, 3), UNTIED, **muon), expected, 4)


def test_experts_on_all_ranks(pool_of_four):
    """AutoEP shares them over tensor groups and beyond; the rest of a layer with experts is shared as ever."""
    expected = train_plainly(WITH_EXPERTS, 4)
    for ep_size in (2, 4):
        cells = cells_of(STAGES if ep_size == 2 else (1, 3), WITH_EXPERTS, ep_size=ep_size)
        assert_same(pool_of_four, cells, expected, 4)


def walk_in_trap(trap: str, cells: list, count: int) -> list:
    """`walk` with a trap set again."""
    places = {
        "norms of the heads": ("minimind.config.tensor_parallel.SUMMED", r"(?!)"),
        "experts in the norm": ("deepspeed.runtime.zero.stage_1_and_2.is_model_parallel_parameter",
                                is_model_parallel_parameter),
    }  # fmt: skip
    with unittest.mock.patch(*places[trap]):
        return walk(cells, count)


@pytest.mark.parametrize("stage", [0, 3])
def test_gradients_of_the_heads_norms_are_summed(pool, plain, stage):
    loss, norm = differences(
        pool.run(walk_in_trap, "norms of the heads", cells_of((stage,)), COUNT)[0][0], plain["dense"]
    )
    assert loss > 1e-4 and norm > 1e-3


def test_the_norm_counts_the_experts_of_all_ranks(pool):
    cells = cells_of((2,), WITH_EXPERTS, ep_size=2)
    curve = pool.run(walk_in_trap, "experts in the norm", cells, 2)[0][0]
    assert differences(curve, train_plainly(WITH_EXPERTS, 2))[1] > 1e-3


@pytest.mark.parametrize(
    "config", [MODEL, ModelConfig(**{**MODEL.to_dict(), **UNTIED}), ModelConfig(**{**EXPERTS, "moe_residual": True})]
)
def test_a_rule_names_every_parameter_once(config):
    shapes = parameter_shapes(config)
    rules = autotp_block(2, shapes)["partition_config"]["layer_specs"]
    for name in shapes:
        found = [rule for rule in rules if any(re.match(pattern, name) for pattern in rule["patterns"])]
        if ".experts." in name and "shared" not in name:
            assert not found  # stacked: AutoTP looks at matrices alone
        else:
            assert len(found) == 1, name
            assert found[0].get("grad_allreduce", False) == ("q_norm" in name or "k_norm" in name)
    assert not [
        name for name in shapes if sum(bool(re.match(rule, name)) for rule in (COLUMNS, ROWS, SUMMED, WHOLE)) > 1
    ]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        (({"tp_size": 4}, {}, {}), "tp_size: 4 ranks cannot share 2 key-value heads .* possible: 1, 2"),
        (({"tp_size": 3}, {}, {}), "tp_size: 3 does not divide 4 ranks; possible: 1, 2"),
        (({"tp_size": 2}, {}, {"intermediate_size": 99}), "feed-forwards of 99 evenly; possible: 1;"),
        (({"tp_size": 2, "sp_size": 4}, {}, {}), "sp_size: 4 does not divide 2 ranks; possible: 1, 2"),
        (({"tp_size": 2}, HPZ, {}), "zero_hpz_partition_size takes neighbours"),
        (({"tp_size": 2, "lora_rank": 2}, {}, {}), "AutoTP would drop the adapters of lora_rank"),
        (({"tp_size": 2}, {}, EXPERTS), "tp_size: 2 needs an ep_size above 1"),
        (({"tp_size": 2, "moe_backend": "deepspeed"}, {}, EXPERTS), "moe_backend: deepspeed"),
        (({"tp_size": 2}, {"tensor_parallel": {"autotp_size": 4}}, {}), "tp_size is 2 in the run and 4"),
        (({}, {"tensor_parallel": {"autotp_size": 2, "preset_model": "llama"}}, {}), "written from the model"),
        (({}, {"tensor_parallel": {"autotp_sise": 2}}, {}), "unknown field 'autotp_sise'; did you mean 'autotp_size'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(settings, word):
    with pytest.raises(UserError, match=word):
        resolve(4, settings)


def test_the_json_may_say_it():
    resolved = resolve(4, ({}, {"tensor_parallel": {"autotp_size": 2, "tp_overlap_comm": True}}, {}))
    again = resolve_run(resolved.run, resolved.ds, world_size=4, local_world_size=4)
    assert again.run == resolved.run and again.ds == resolved.ds
    assert (resolved.train.tp_size, resolved.dp_size) == (2, 2) and resolved.ds["tensor_parallel"]["tp_overlap_comm"]
    assert "tensor_parallel" not in resolve(4, ({}, {"tensor_parallel": {"autotp_size": 0}}, {})).ds
    assert possible_tp_sizes(MODEL) == [1, 2] and tensor_parallel.cut_dimension("lm_head.weight") is None


def test_attention_drops_apart_and_all_else_together():
    config = ModelConfig(**{**MODEL.to_dict(), "attention_dropout": 0.5})
    torch.manual_seed(0)
    attention, mask = Attention(config, 0), unittest.mock.Mock()
    drawn = []
    for rank in (0, 1, 0):
        attention._forward_hooks.clear(), attention._forward_pre_hooks.clear()
        draw_apart(attention, rank)
        with unittest.mock.patch.object(Attention, "forward", lambda *_: torch.rand(3)):
            torch.manual_seed(5)
            drawn.append([attention(mask).tolist(), torch.rand(3).tolist(), attention(mask).tolist()])
    (first, between, again), other, repeated = drawn
    assert drawn[0] == repeated and first != again
    assert other[0] != first and other[1] == between and other[2] != again
