"""Products by oneDNN: the values and gradients of torch's own, and only where they are meant to be."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from expert_runs import DENSE, train_plainly, walk
from pytest import approx
from training_runs import RankPool, rank_pool

from minimind.model import PRESETS, MiniMindForCausalLM
from minimind.model.kernels import matmul
from minimind.model.kernels.matmul import is_better_by_onednn, is_onednn_faster, linear, onednn_product, pack, product

pytestmark = pytest.mark.skipif(not matmul.has_onednn(), reason="this torch has no oneDNN")


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(matmul, "is_onednn_faster", lambda: True)
    monkeypatch.setattr(matmul, "_SMALLEST", 0)


@pytest.fixture(scope="module")
def pool():
    yield from rank_pool(2)


def off_by(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (1, 24), (2, 3, 4, 24)], ids=str)
@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)], ids=str)
def test_values_and_gradients_are_those_of_float64(always, shape, needed):
    torch.manual_seed(0)
    x, weight = torch.randn(shape, requires_grad=needed[0]), torch.randn(40, 24, requires_grad=needed[1])
    exact_x, exact_weight = (part.detach().double().requires_grad_(part.requires_grad) for part in (x, weight))
    found, exact = linear(x, weight), F.linear(exact_x, exact_weight)
    assert type(found.grad_fn).__name__ == "_LinearBackward"
    probe = torch.randn_like(found)
    found.backward(probe)
    exact.backward(probe.double())
    assert found.shape == exact.shape and off_by(found, exact) < 1e-6
    for ours, theirs in ((x, exact_x), (weight, exact_weight)):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or (ours.grad.is_contiguous() and off_by(ours.grad, theirs.grad) < 1e-6)


def test_a_product_without_gradient_is_exact_too(always):
    left, right = torch.randn(30, 50), torch.randn(20, 50)
    exact = left.double() @ right.double().t()
    for found in (product(left, right.t()), onednn_product(left, pack(right)), onednn_product(left[None], right)[0]):
        assert off_by(found, exact) < 1e-6
    assert torch.equal(product(left, right.t()), product(left, right.t()))


def test_what_is_not_float32_on_a_cpu_is_left_to_torch(always):
    x, weight = torch.randn(4, 8), torch.randn(8, 8)
    assert is_better_by_onednn(x, weight)
    assert not is_better_by_onednn(x.bfloat16(), weight.bfloat16())
    assert not is_better_by_onednn(x.double(), weight.double())
    assert not is_better_by_onednn(x.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_better_by_onednn(x, weight)
        assert linear(x, weight).dtype == torch.bfloat16


def test_small_products_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(matmul, "is_onednn_faster", lambda: True)
    assert not is_better_by_onednn(torch.randn(1, 768), torch.randn(768, 768))
    assert is_better_by_onednn(torch.randn(64, 768), torch.randn(768, 768))


@pytest.mark.parametrize("preset", ["tiny", "tiny-moe"])
def test_a_model_is_the_same(monkeypatch, preset):
    """Loss and every gradient, experts and the loss by chunks among them."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(dataclasses.replace(PRESETS[preset], vocab_size=300, num_hidden_layers=2))
    other, tokens = copy.deepcopy(model), torch.randint(3, 300, (2, 30))
    monkeypatch.setattr(matmul, "_SMALLEST", 0)
    losses = []
    for one, is_on in ((model, False), (other, True)):
        monkeypatch.setattr(matmul, "is_onednn_faster", lambda is_on=is_on: is_on)
        output = one(tokens, tokens)
        total = output.loss if output.aux_loss is None else output.loss + output.aux_loss
        total.backward()
        losses.append(total.item())
    assert losses[1] == approx(losses[0], rel=1e-6)
    for (name, ours), theirs in zip(other.named_parameters(), model.parameters(), strict=True):
        assert off_by(ours.grad, theirs.grad.double()) < 1e-5, name


def test_compiled_it_stays_onednn_s(always):
    """Without a break of the graph, forward and backward."""
    torch._dynamo.reset()
    x, weight = torch.randn(2, 4, 24, requires_grad=True), torch.randn(40, 24, requires_grad=True)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    found, probe = compiled(x, weight), torch.randn(2, 4, 40)
    assert torch.equal(found, onednn_product(x, weight))
    wanted = torch.autograd.grad(linear(x, weight), (x, weight), probe)
    for left, right in zip(torch.autograd.grad(found, (x, weight), probe), wanted, strict=True):
        assert torch.equal(left, right)


def test_a_compiled_model_is_the_same(always):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = MiniMindForCausalLM(dataclasses.replace(PRESETS["tiny"], vocab_size=300, num_hidden_layers=1))
    tokens = torch.randint(3, 300, (2, 30))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert compiled(tokens, tokens).loss.item() == approx(model(tokens, tokens).loss.item(), rel=1e-6)


@pytest.mark.skipif(not is_onednn_faster(), reason="torch's own products are taken on this processor")
def test_every_zero_stage_trains_as_in_the_plain_loop(monkeypatch, pool: RankPool):
    """Large enough that both ranks multiply by oneDNN; the loop that they are compared with does not."""
    model = {**DENSE, "hidden_size": 256, "intermediate_size": 512}
    ranks = pool.run(walk, [(stage, model, {}) for stage in range(4)], 4)
    monkeypatch.setattr(matmul, "is_onednn_faster", lambda: False)
    losses, norms = train_plainly(model, 4)
    for curves in ranks:
        for found in curves:
            assert found[0] == approx(losses, rel=1e-4) and found[1] == approx(norms, rel=1e-3)
