"""Experts under DeepSpeed against the plain model on one process: every backend, ZeRO stage and ep size."""

import pytest
from expert_runs import DENSE, EXPERTS, train_plainly, walk
from pytest import approx
from training_runs import RankPool, rank_pool

STEPS = 20
MODELS = {None: DENSE, "autoep": EXPERTS}


@pytest.fixture(scope="module")
def pool():
    yield from rank_pool(2)


@pytest.fixture(scope="module")
def one_rank():
    yield from rank_pool(1)


@pytest.fixture(scope="module")
def plain():
    return {backend: train_plainly(model, STEPS) for backend, model in MODELS.items()}


def table(backend, sizes):
    """The cells of one row of the README's table."""
    return [(stage, MODELS[backend], {"moe_backend": backend, "ep_size": ep}) for stage in range(4) for ep in sizes]


def assert_same(found, expected):
    losses, norms = found
    assert losses == approx(expected[0], rel=1e-4)
    assert norms == approx(expected[1], rel=1e-3)
    assert max(norms) > 1.0, "nothing was clipped"


@pytest.mark.parametrize("backend", [None, "autoep"])
def test_two_ranks_are_the_plain_loop(pool: RankPool, plain, backend):
    cells = table(backend, (None,) if backend is None else (1, 2))
    for ranks in pool.run(walk, cells, STEPS):
        for found in ranks:
            assert_same(found, plain[backend])


def test_one_rank_is_the_plain_loop(one_rank: RankPool, plain):
    (found,) = one_rank.run(walk, table("autoep", (1,)), STEPS)
    for curve in found:
        assert_same(curve, plain["autoep"])
