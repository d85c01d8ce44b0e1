"""Products by oneDNN and in float32: exact, and only where they are meant to be.

Which processor this is, is set here, so the tests hold on every machine.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from expert_runs import DENSE, train_plainly, walk
from pytest import approx
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import RankPool, rank_pool

from minimind.model import PRESETS, MiniMindForCausalLM
from minimind.model.kernels import matmul as kernel
from minimind.model.kernels.apply import apply_kernels
from minimind.model.kernels.matmul import FastLMHead, linear, matmul, onednn_matmul, pack, upcasts_to_fp32, uses_onednn

needs_onednn = pytest.mark.skipif(not kernel.has_onednn(), reason="this torch has no oneDNN")
SIXTEEN_BIT = [torch.bfloat16, torch.float16]
ROUNDING = {torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float32: 1e-6}  # of one number, relative, at most


@pytest.fixture
def onednn(monkeypatch):
    monkeypatch.setattr(kernel, "is_onednn_faster", lambda: True)


@pytest.fixture
def without_products(monkeypatch):
    monkeypatch.setattr(kernel, "has_fast_matmul", lambda dtype: False)


@pytest.fixture(scope="module")
def pool():
    yield from rank_pool(2)


def off_by(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BIT], ids=str)
@pytest.mark.parametrize("shape", [(40, 256), (2, 17, 256), (1, 256), (2, 3, 8, 256)], ids=str)
@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)], ids=str)
def test_values_and_gradients_are_rounded_once(onednn, without_products, dtype, shape, needed):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype, requires_grad=needed[0])
    weight = torch.randn(384, 256, dtype=dtype, requires_grad=needed[1])
    exact_x, exact_weight = (part.detach().double().requires_grad_(part.requires_grad) for part in (x, weight))
    found, exact = linear(x, weight), F.linear(exact_x, exact_weight)
    probe = torch.randn_like(found)
    found.backward(probe)
    exact.backward(probe.double())
    assert found.dtype == dtype and found.shape == exact.shape and off_by(found, exact) < ROUNDING[dtype]
    for ours, theirs in ((x, exact_x), (weight, exact_weight)):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or (ours.grad.dtype == dtype and off_by(ours.grad, theirs.grad) < ROUNDING[dtype])


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BIT], ids=str)
def test_products_without_gradients(onednn, without_products, dtype):
    left, right = torch.randn(40, 256).to(dtype), torch.randn(256, 384).to(dtype)
    exact = left.double() @ right.double()
    target, total = torch.empty(40, 384, dtype=dtype), torch.ones(40, 384)
    assert torch.equal(matmul(left, right, out=target), matmul(left, right))
    FastLMHead.add_matmul(total, left, right)
    assert off_by(target, exact) < ROUNDING[dtype] and off_by(total, exact + 1) < 1e-6  # a float32 total is not rounded
    if dtype == torch.float32:
        columns = right.t().contiguous()
        assert off_by(onednn_matmul(left, pack(columns)), exact) < 1e-6
        assert off_by(onednn_matmul(left[None], columns)[0], exact) < 1e-6
        assert onednn_matmul(left[:0], columns).shape == (0, 384)


def test_what_waits_for_the_backward_pass_stays_16_bit_wide(without_products):
    x = torch.randn(16, 24, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(40, 24, dtype=torch.bfloat16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: saved.append(kept) or kept, lambda kept: kept):
        linear(x, weight)
    assert {kept.dtype for kept in saved} == {torch.bfloat16}


def test_autocast_is_followed(without_products):
    x, weight = torch.randn(16, 24, requires_grad=True), torch.randn(40, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear(x, weight)
    assert torch.equal(found, linear(x.bfloat16(), weight.bfloat16()))
    found.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


def test_only_large_float32_products_on_a_cpu_are_onednn_s(onednn):
    x, weight = torch.randn(64, 768), torch.randn(768, 768)
    assert uses_onednn(x, weight) and not uses_onednn(x[:1], weight)
    assert not uses_onednn(x.bfloat16(), weight.bfloat16()) and not uses_onednn(x.double(), weight.double())
    assert not uses_onednn(x.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not uses_onednn(x, weight)
        assert linear(x, weight).dtype == torch.bfloat16


def test_only_16_bit_rows_on_a_cpu_are_upcast(without_products, monkeypatch):
    rows = torch.randn(8, 24)
    assert upcasts_to_fp32(rows.bfloat16()) and upcasts_to_fp32(rows.half())
    assert upcasts_to_fp32(rows, torch.bfloat16)
    assert not upcasts_to_fp32(rows) and not upcasts_to_fp32(rows.double())
    assert not upcasts_to_fp32(rows.bfloat16()[:7]), "a few rows are faster as they are"
    assert not upcasts_to_fp32(rows.bfloat16().to("meta"))
    monkeypatch.setattr(kernel, "has_fast_matmul", lambda dtype: True)
    assert not upcasts_to_fp32(rows.bfloat16())


class Multiplied(TorchDispatchMode):
    """The dtypes of all matrix products inside."""

    def __enter__(self):
        self.dtypes = set()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.linear):
            self.dtypes.add(args[-1].dtype)
        return function(*args, **(kwargs or {}))


def test_a_row_is_upcast_where_its_matrix_is_not_transposed(without_products):
    """As in gradients: the sums are exact to one rounding, as torch's own in 16 bit need not be."""
    row, matrix = torch.randn(1, 24).bfloat16(), torch.randn(40, 24).bfloat16()
    with Multiplied() as products, torch.no_grad():
        matmul(row, matrix.t())
        linear(row, matrix)
    assert products.dtypes == {torch.bfloat16}
    with Multiplied() as products:
        matmul(row, matrix.t().contiguous())
        linear(row, matrix.requires_grad_())
    assert products.dtypes == {torch.float32}


@needs_onednn
def test_torch_is_asked_what_this_processor_has():
    assert kernel.has_fast_matmul(torch.bfloat16) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert kernel.has_fast_matmul(torch.float16) == torch.ops.mkldnn._is_mkldnn_fp16_supported()


@needs_onednn
def test_compiled_it_stays_onednn_s(onednn):
    """Without a break of the graph, forward and backward."""
    torch._dynamo.reset()
    x, weight = torch.randn(2, 20, 256, requires_grad=True), torch.randn(384, 256, requires_grad=True)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    found, probe = compiled(x, weight), torch.randn(2, 20, 384)
    assert torch.equal(found, onednn_matmul(x, weight))
    wanted = torch.autograd.grad(linear(x, weight), (x, weight), probe)
    for left, right in zip(torch.autograd.grad(found, (x, weight), probe), wanted, strict=True):
        assert torch.equal(left, right)


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_traced_whole(onednn, without_products, dtype):
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS["tiny"], hidden_size=256, vocab_size=300, num_hidden_layers=1)
    model, tokens = MiniMindForCausalLM(config).to(dtype), torch.randint(3, 300, (2, 32))
    apply_kernels(model, "cpu")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(tokens, tokens).loss
    assert found.item() == approx(model(tokens, tokens).loss.item(), rel=1e-4)
    found.backward()
    traced = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(tokens, tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert off_by(traced[name], parameter.grad.double()) < (1e-5 if dtype == torch.float32 else 0.02), name


@pytest.mark.skipif(not kernel.is_onednn_faster(), reason="torch's own products are taken on this processor")
def test_every_zero_stage_trains_as_in_the_plain_loop(pool: RankPool):
    """Large enough that both ranks multiply by oneDNN; the loop that they are compared with does not."""
    model = {**DENSE, "hidden_size": 256, "intermediate_size": 512}
    ranks = pool.run(walk, [(stage, model, {}) for stage in range(4)], 4)
    losses, norms = train_plainly(model, 4)
    for curves in ranks:
        for found in curves:
            assert found[0] == approx(losses, rel=1e-4) and found[1] == approx(norms, rel=1e-3)
