"""16-bit products on a processor without them: computed in float32, rounded once, and only where they are meant to be.

Whether this processor has them is set here, so the tests hold on every machine.
"""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from pytest import approx

from minimind.model import PRESETS, MiniMindForCausalLM
from minimind.model.attention import attend_fused, attend_plainly
from minimind.model.attention_mask import Visibility
from minimind.model.kernels import matmul
from minimind.model.kernels.grouped_mm import grouped_linear
from minimind.model.kernels.matmul import add_product, is_better_widened, linear, product, write_product

SIXTEEN_BIT = [torch.bfloat16, torch.float16]
ROUNDING = {torch.bfloat16: 2**-9, torch.float16: 2**-12}  # of one number, relative, at most


def without_products(monkeypatch, *, has_products: bool = False) -> None:
    monkeypatch.setattr(matmul, "multiplies", lambda dtype: has_products)


def off_by(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize("shape", [(16, 24), (2, 5, 24), (3, 24)], ids=str)
@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)], ids=str)
def test_values_and_gradients_are_rounded_once(monkeypatch, dtype, shape, needed):
    without_products(monkeypatch)
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype, requires_grad=needed[0])
    weight = torch.randn(40, 24, dtype=dtype, requires_grad=needed[1])
    exact_x, exact_weight = (part.detach().double().requires_grad_(part.requires_grad) for part in (x, weight))
    found, exact = linear(x, weight), F.linear(exact_x, exact_weight)
    probe = torch.randn_like(found)
    found.backward(probe)
    exact.backward(probe.double())
    assert found.dtype == dtype and found.shape == exact.shape and off_by(found, exact) < ROUNDING[dtype]
    for ours, theirs in ((x, exact_x), (weight, exact_weight)):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or (ours.grad.dtype == dtype and off_by(ours.grad, theirs.grad) < ROUNDING[dtype])


def test_what_waits_for_the_backward_pass_stays_16_bit_wide(monkeypatch):
    without_products(monkeypatch)
    x = torch.randn(16, 24, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(40, 24, dtype=torch.bfloat16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: saved.append(kept) or kept, lambda kept: kept):
        linear(x, weight)
    assert {kept.dtype for kept in saved} == {torch.bfloat16}


def test_autocast_is_followed(monkeypatch):
    without_products(monkeypatch)
    x, weight = torch.randn(16, 24, requires_grad=True), torch.randn(40, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear(x, weight)
    assert torch.equal(found, linear(x.bfloat16(), weight.bfloat16()))
    found.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_products_without_gradients(monkeypatch, dtype):
    without_products(monkeypatch)
    left, right = torch.randn(16, 24).to(dtype), torch.randn(24, 40).to(dtype)
    exact = left.double() @ right.double()
    target, total = torch.empty(16, 40, dtype=dtype), torch.ones(16, 40)
    write_product(target, left, right)
    add_product(total, left, right)
    assert torch.equal(product(left, right), target) and off_by(target, exact) < ROUNDING[dtype]
    assert off_by(total, exact + 1) < 1e-6  # a float32 total is not rounded


def test_only_16_bit_rows_on_a_cpu_are_widened(monkeypatch):
    without_products(monkeypatch)
    rows = torch.randn(8, 24)
    assert is_better_widened(rows.bfloat16()) and is_better_widened(rows.half())
    assert is_better_widened(rows, torch.bfloat16)
    assert not is_better_widened(rows) and not is_better_widened(rows.double())
    assert not is_better_widened(rows.bfloat16()[:7]), "a few rows are faster as they are"
    assert not is_better_widened(rows.bfloat16().to("meta"))
    without_products(monkeypatch, has_products=True)
    assert not is_better_widened(rows.bfloat16())


def test_few_rows_are_widened_where_the_matrix_is_not_transposed(monkeypatch):
    """Gradients meet it so; the widened sums are exact to one rounding, as torch's own in 16 bit need not be."""
    without_products(monkeypatch)
    counted = []
    monkeypatch.setattr(torch.Tensor, "float", lambda x, float=torch.Tensor.float: counted.append(x.shape) or float(x))
    row, matrix = torch.randn(1, 24).bfloat16(), torch.randn(40, 24).bfloat16()
    product(row, matrix.t())
    with torch.no_grad():
        linear(row, matrix)
    assert not counted
    product(row[:, :24], matrix.t().contiguous())
    linear(row, matrix.requires_grad_())
    assert len(counted) == 4  # both factors of both


def test_torch_is_asked_what_this_processor_has():
    if not matmul.has_onednn():
        assert matmul.multiplies(torch.bfloat16) and matmul.multiplies(torch.float16)
    else:
        assert matmul.multiplies(torch.bfloat16) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
        assert matmul.multiplies(torch.float16) == torch.ops.mkldnn._is_mkldnn_fp16_supported()


@pytest.mark.parametrize("attend", [attend_fused, attend_plainly])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_attention(monkeypatch, attend, autocast):
    """Values and gradients are those of float32 on the same numbers."""
    without_products(monkeypatch)
    torch.manual_seed(0)
    shapes = ((2, 4, 12, 16), (2, 2, 12, 16), (2, 2, 12, 16))
    inputs = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    exact_inputs = [part.detach().float().requires_grad_() for part in inputs]
    visibility = Visibility(is_causal=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = attend(*inputs, visibility, 0.0)
    exact = attend(*exact_inputs, visibility, 0.0)
    assert found.dtype == torch.bfloat16 and torch.equal(found, exact.bfloat16())
    probe = torch.randn_like(found)
    found.backward(probe)
    exact.backward(probe.float())
    for ours, theirs in zip(inputs, exact_inputs, strict=True):
        assert torch.equal(ours.grad, theirs.grad.bfloat16())


def test_grouped_products(monkeypatch):
    without_products(monkeypatch)
    rows = torch.randn(20, 16, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(3, 24, 16, dtype=torch.bfloat16, requires_grad=True)
    ends = torch.tensor([9, 9, 20], dtype=torch.int32)
    found = grouped_linear(rows, weight, ends)
    parts = [rows[:9].double() @ weight[0].double().t(), rows[9:].double() @ weight[2].double().t()]
    assert found.dtype == torch.bfloat16 and off_by(found, torch.cat(parts)) < ROUNDING[torch.bfloat16]
    found.sum().backward()
    assert rows.grad.dtype == weight.grad.dtype == torch.bfloat16 and not weight.grad[1].any()


@pytest.mark.parametrize("preset", ["tiny", "tiny-moe"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_a_model_is_the_same_as_with_16_bit_products(monkeypatch, preset, autocast):
    """Loss and every gradient, within what bf16 rounds; experts and the loss by chunks among them."""
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS[preset], vocab_size=300, num_hidden_layers=2)
    model = MiniMindForCausalLM(config).to(torch.float32 if autocast else torch.bfloat16)
    other, tokens, losses = copy.deepcopy(model), torch.randint(3, 300, (2, 30)), []
    for one, has_products in ((model, True), (other, False)):
        without_products(monkeypatch, has_products=has_products)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = one(tokens, tokens)
        total = output.loss if output.aux_loss is None else output.loss + output.aux_loss
        total.backward()
        losses.append(total.item())
    assert losses[1] == approx(losses[0], rel=2e-3)
    for (name, ours), theirs in zip(other.named_parameters(), model.parameters(), strict=True):
        if "experts" not in name and "gate" not in name:  # a token near the border goes to another expert
            assert off_by(ours.grad, theirs.grad.double()) < 0.05, name


def test_a_compiled_model_is_the_same(monkeypatch):
    """Traced whole, and the products stay float32 ones."""
    without_products(monkeypatch)
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS["tiny"], vocab_size=300, num_hidden_layers=1)
    model, tokens = MiniMindForCausalLM(config).bfloat16(), torch.randint(3, 300, (2, 30))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(tokens, tokens).loss
    assert found.item() == approx(model(tokens, tokens).loss.item(), rel=1e-4)
    found.backward()
    traced = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(tokens, tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert off_by(traced[name], parameter.grad.double()) < 0.02, name
