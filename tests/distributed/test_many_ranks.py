"""What grows with the number of ranks: counted with 64 of them as threads, so that nothing creeps back in."""

import math

import pytest
import torch
from many_ranks import GPUS_A_HOST, SHARDS, World, count

from minimind.distributed.collectives import all_reduce_ints, gather_objects, lead_from_first_rank
from minimind.errors import UserError
from minimind.files import ROOT

RANKS = 64
DOUBLINGS = int(math.log2(RANKS))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return count(RANKS, tmp_path_factory.mktemp("ranks"))


def test_a_start_asks_the_store_little_and_examines_a_host_once(found):
    sources = len(list((ROOT / "minimind").rglob("*.py")))
    once = RANKS // GPUS_A_HOST * (sources + 8) + 2 * SHARDS
    assert found["start"]["sum"]["opened"] < once + 4 * RANKS, "every rank opens what one of its host has"
    assert found["start"]["most"]["asked"] < 40, "rank 0 asks for every rank again and again"
    assert found["a beat"]["most"]["asked"] <= 4 and found["a beat"]["sum"]["asked"] <= 2 * RANKS + 2


def test_what_all_ranks_do_together_takes_few_hops(found):
    agreement = found["a step's agreement"]["most"]
    assert agreement["hops"] == agreement["messages"] == DOUBLINGS
    assert found["save"]["most"]["hops"] <= 15 * DOUBLINGS and found["resume"]["most"]["hops"] <= 5 * DOUBLINGS
    assert found["connections to other ranks"]["most"]["open"] <= 2 * DOUBLINGS


def test_a_resume_is_read_by_all_ranks_and_a_window_opens_nothing_twice(found):
    resume = found["resume"]
    assert resume["most"]["hashed"] <= 3 * resume["sum"]["hashed"] / RANKS
    assert found["windows at first"]["sum"]["opened"] == 2 * SHARDS  # its header is compared once
    assert "opened" not in found["windows later"]["sum"]


def test_another_number_of_ranks_reads_each_byte_once_from_the_files_that_have_it(found):
    resume = found["resume on fewer ranks"]
    assert resume["sum"]["read"] == 12  # a weight and two moments of float32
    assert resume["most"]["read"] <= 12.1 * 4 / 3 / RANKS
    assert resume["sum"]["opened"] <= 12 * RANKS, "a rank opens files of ranks whose parts it does not hold"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 8, 13])
def test_sums_gatherings_and_shared_work_at_any_number_of_ranks(size):
    world = World(size)

    def work(rank: int) -> None:
        assert all_reduce_ints([rank, 1], torch.add) == [size * (size - 1) // 2, size]
        assert all_reduce_ints([rank, -rank], torch.maximum) == [size - 1, 0]
        assert gather_objects("x" * rank) == ["x" * other for other in range(size)]
        shared = []
        assert lead_from_first_rank(lambda share: share(abs, [*range(-50, 0)]), lambda: shared.append(rank)) == [
            *range(50, 0, -1)
        ]
        assert len(shared) == -(-50 // (4 * size)), "a round asks for more of a rank than it should"

        def fail(share) -> None:
            try:
                share(open, ["/nowhere"] * 3)
            except OSError as error:
                raise UserError(f"no {error.filename}") from None

        with pytest.raises(UserError, match="no /nowhere"):
            lead_from_first_rank(fail)

    with world.in_place_of_torch():
        world.run(work)
