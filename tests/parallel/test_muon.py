"""Muon: what it makes of a matrix, which it takes, and every ZeRO stage against a plain loop."""

import unittest.mock

import pytest
import torch
from expert_runs import DENSE, EXPERTS, MUON_LR, OTHER_LR, train_plainly, walk
from pytest import approx
from training_runs import rank_pool

from minimind.model import MiniMindForCausalLM, ModelConfig
from minimind.parallel import muon
from minimind.parallel.muon import orthogonalize
from minimind.parallel.optimizer import parameter_groups

STEPS = 4
# Neither kind of layer has square matrices only: a tall one is scaled.
WIDE = {**DENSE, "intermediate_size": 64}
WIDE_EXPERTS = {**EXPERTS, "intermediate_size": 48, "moe_intermediate_size": 48}
UNTIED = {**WIDE, "tie_word_embeddings": False}
OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
SETTINGS = {"optimizer": "muon", "muon_lr": MUON_LR}


@pytest.fixture(scope="module")
def plain():
    return {name_of(model): train_plainly(model, STEPS, muon=True) for model in (WIDE, WIDE_EXPERTS, UNTIED)}


def name_of(model):
    return "experts" if model.get("use_moe") else "dense" if model["tie_word_embeddings"] else "untied"


def walk_in_small_buckets(cells, count):
    """Matrices that are cut are exchanged in several buckets."""
    with unittest.mock.patch.object(muon, "BUCKET_ELEMENTS", 3000):
        return walk(cells, count)


def check(ranks, cells, plain):
    for curves in ranks:
        for (stage, model, settings), (losses, norms) in zip(cells, curves, strict=True):
            expected_losses, expected_norms = plain[name_of(model)]
            assert losses == approx(expected_losses, rel=1e-4), (stage, settings)
            assert norms == approx(expected_norms, rel=1e-3), (stage, settings)
    assert max(max(norms) for _, norms in plain.values()) > 1.0, "nothing was clipped"


@pytest.fixture(scope="module")
def cells():
    """(stage, model, settings) of runs that are all the same."""
    found = [(stage, WIDE, SETTINGS) for stage in range(4)]
    found += [(stage, UNTIED, {**SETTINGS, **OTHER_LR}) for stage in (0, 1, 3)]
    for stage, backend, ep_size in (
        (0, "autoep", 2), (1, "autoep", 2), (2, "autoep", 2), (3, "autoep", 2), (3, "autoep", 1), (1, "deepspeed", 2)
    ):  # fmt: skip
        found.append((stage, WIDE_EXPERTS, {**SETTINGS, "moe_backend": backend, "ep_size": ep_size}))
    return found


def test_two_ranks_are_the_plain_loop(plain, cells):
    for pool in rank_pool(2):
        check(pool.run(walk, cells, STEPS), cells, plain)
        split = [cell for cell in cells if cell[0] == 3]
        check(pool.run(walk_in_small_buckets, split, STEPS), split, plain)


def test_one_rank_is_the_plain_loop(plain, cells):
    alone = [cell for cell in cells if cell[2].get("ep_size") != 2]
    alone.append((2, WIDE, {**SETTINGS, "ds": OFFLOAD}))
    for pool in rank_pool(1):
        check(pool.run(walk, alone, STEPS), alone, plain)


@pytest.mark.parametrize("shape", [(24, 24), (24, 60), (60, 24), (24, 30)], ids=str)
def test_singular_values_become_alike(shape):
    torch.manual_seed(0)
    stack = torch.stack([torch.randn(shape), torch.randn(shape) * 1e-3, torch.zeros(shape)])
    first, second, zero = orthogonalize(stack)
    scale = max(1, shape[0] / shape[1]) ** 0.5
    for matrix, found in zip(stack[:2], (first, second), strict=True):
        values = torch.linalg.svdvals(found) / scale
        assert values.min() > 0.2 and values.max() < 1.3
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)  # the same directions
        torch.testing.assert_close((u.mT @ found @ v.mT).diagonal().sign(), torch.ones(min(shape)))
    assert not zero.any()


@pytest.mark.parametrize(
    "model",
    [DENSE, {**EXPERTS, "n_shared_experts": 0, "moe_residual": True}, {**DENSE, "tie_word_embeddings": False}],
    ids=("dense", "moe", "untied"),
)
def test_muon_takes_the_matrices_between_embedding_and_output(model):
    module = MiniMindForCausalLM(ModelConfig(**model))
    names = {parameter: name for name, parameter in module.named_parameters()}
    groups = {group["kind"]: group for group in parameter_groups(module, 0.1, muon=True)}
    untied = model.get("tie_word_embeddings") is False
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "muon": 0.1, "matrices": 0.1, "vectors": 0.0, **({"embedding": 0.1} if untied else {})
    }  # fmt: skip
    of_adamw = {names[parameter] for parameter in groups["matrices"]["params"]}
    routers = {name for name in names.values() if name.endswith(("mlp.gate.weight", ".coefficient.weight"))}
    assert of_adamw == {"lm_head.weight" if untied else "model.embed_tokens.weight", *routers}
    assert len(routers) == (4 if model.get("use_moe") else 0)
    assert sum(len(group["params"]) for group in groups.values()) == len(names)
