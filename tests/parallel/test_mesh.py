"""The mesh of ranks: places and groups, as the picture in its module has them."""

import itertools

import pytest

from minimind.parallel.mesh import Mesh


def test_the_picture():
    mesh = Mesh(2, 2, 2)
    assert mesh.groups() == {
        "tensor": [[0, 1], [2, 3], [4, 5], [6, 7]],
        "sequence": [[0, 2], [1, 3], [4, 6], [5, 7]],
        "averaging": [[0, 2, 4, 6], [1, 3, 5, 7]],
    }
    places = [
        (Mesh(2, 2, 2, rank).dp_rank, Mesh(2, 2, 2, rank).sp_rank, Mesh(2, 2, 2, rank).tp_rank) for rank in range(8)
    ]
    assert places == list(itertools.product(range(2), range(2), range(2)))


@pytest.mark.parametrize("sizes", [(3, 1, 1), (1, 4, 1), (2, 4, 1), (1, 1, 2), (3, 2, 4)])
def test_every_rank_is_in_one_group_of_a_kind_at_its_own_number(sizes):
    for rank in range(sizes[0] * sizes[1] * sizes[2]):
        mesh = Mesh(*sizes, rank)
        numbers = {"tensor": mesh.tp_rank, "sequence": mesh.sp_rank, "averaging": mesh.averaging_rank}
        for kind, groups in mesh.groups().items():
            (own,) = [group for group in groups if rank in group]
            assert own[numbers[kind]] == rank
            assert own == sorted(own)
