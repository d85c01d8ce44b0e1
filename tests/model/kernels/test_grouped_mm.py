"""The product of row groups with their own matrices, against a plain loop."""

import itertools

import pytest
import torch

from minimind.model.kernels.grouped_mm import grouped_linear

# (in, out): aligned to 16 bytes in every type, and not.
SHAPES = {"aligned": (16, 24), "not aligned": (15, 21)}
ENDS = {"even": [3, 6, 9, 12], "idle": [0, 5, 5, 12], "all in the last": [0, 0, 0, 12], "no rows": [0, 0, 0, 0]}


def make_case(shape, ends, dtype):
    torch.manual_seed(0)
    rows = torch.randn(ends[-1], shape[0], dtype=dtype, requires_grad=True)
    weight = torch.randn(len(ends), shape[1], shape[0], dtype=dtype, requires_grad=True)
    return rows, weight, torch.tensor(ends, dtype=torch.int32)


def loop(rows, weight, ends):
    starts = [0, *ends.tolist()]
    pieces = [rows[start:end] @ weight[i].t() for i, (start, end) in enumerate(itertools.pairwise(starts))]
    return torch.cat(pieces)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_value_and_gradients_are_those_of_a_loop(shape, ends, dtype):
    rows, weight, ends = make_case(shape, ends, dtype)
    found, wanted = grouped_linear(rows, weight, ends), loop(rows, weight, ends)
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found, wanted, **tolerance)
    probe = torch.randn_like(wanted)
    found_grads = torch.autograd.grad(found, (rows, weight), probe)
    for left, right in zip(found_grads, torch.autograd.grad(wanted, (rows, weight), probe), strict=True):
        torch.testing.assert_close(left, right, **tolerance)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_without_a_graph_break(shape, dtype):
    torch._dynamo.reset()
    rows, weight, ends = make_case(shape, ENDS["idle"], dtype)
    found = torch.compile(grouped_linear, fullgraph=True, backend="aot_eager")(rows, weight, ends)
    wanted = grouped_linear(rows, weight, ends)
    torch.testing.assert_close(found, wanted)
    probe = torch.randn_like(wanted)
    found_grads = torch.autograd.grad(found, (rows, weight), probe)
    for left, right in zip(found_grads, torch.autograd.grad(wanted, (rows, weight), probe), strict=True):
        torch.testing.assert_close(left, right)


def test_autocast_decides_the_type():
    rows, weight, ends = make_case(SHAPES["aligned"], ENDS["idle"], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = grouped_linear(rows, weight, ends)
    assert found.dtype == torch.bfloat16
    assert [grad.dtype for grad in torch.autograd.grad(found.float().sum(), (rows, weight))] == [torch.float32] * 2


def test_an_idle_matrix_is_not_read():
    rows, weight, ends = make_case(SHAPES["aligned"], [0, 1, 1, 1], torch.float32)
    with torch.no_grad():
        weight[[0, 2, 3]] = float("nan")
        assert grouped_linear(rows, weight, ends).isfinite().all()
