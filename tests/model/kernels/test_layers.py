"""RMSNorm and SwiGLU as they are trained on a CPU: torch's own values and gradients, and less that is kept for them."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from minimind.model import PRESETS, MiniMindForCausalLM, layers
from minimind.model.config import ModelConfig
from minimind.model.kernels import layers as cpu_layers
from minimind.model.kernels.layers import gated_linear, is_recomputed, rms_norm
from minimind.model.layers import FeedForward, RMSNorm

EPS = 1e-5


def gradients(run: Any, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """The outcome of `run` and the gradients of the inputs that want one, by a fixed probe."""
    inputs = tuple(part.detach().requires_grad_(part.requires_grad) for part in inputs)
    found = run(*inputs)
    found.backward(torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found.dtype))
    return [found.detach()] + [part.grad for part in inputs if part.grad is not None]


def off_by(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def kept_bytes(module: torch.nn.Module, x: torch.Tensor) -> int:
    """What autograd keeps of a forward besides parameters, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(x)
    assert output.requires_grad
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    return sum(size for place, size in kept.items() if place not in parameters)


def plain_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def plain_gate(gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(F.silu(gate) * up, weight)


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 3, 24), (1, 24), (3, 1), (0, 24), (300, 1000)], ids=str)
@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)], ids=str)
def test_norms_and_their_gradients_are_those_of_float64(shape, needed):
    torch.manual_seed(0)
    x, weight = (torch.randn(size).requires_grad_(own) for size, own in zip((shape, shape[-1:]), needed, strict=True))
    exact = gradients(plain_norm, (x.double(), weight.double()))
    for found, wanted in zip(gradients(lambda *both: rms_norm(*both, EPS), (x, weight)), exact, strict=True):
        assert found.shape == wanted.shape and found.is_contiguous()
        assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-5)
    doubled = gradients(lambda *both: rms_norm(*both, EPS), (x.double(), weight.double()))
    assert all(torch.allclose(*both, rtol=1e-10) for both in zip(doubled, exact, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_in_16_bit_are_no_further_from_exact_than_torch_s(dtype):
    torch.manual_seed(0)
    x, weight = 3 * torch.randn(500, 96), 1 + 0.1 * torch.randn(96)
    inputs = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    exact = gradients(plain_norm, tuple(part.double() for part in inputs))
    theirs, ours = gradients(plain_norm, inputs), gradients(lambda *both: rms_norm(*both, EPS), inputs)
    for found, plain, wanted in zip(ours, theirs, exact, strict=True):
        assert found.dtype == dtype
        assert off_by(found, wanted) < 1.1 * off_by(plain, wanted) + 1e-6


def test_a_norm_of_rows_that_lie_apart():
    whole = torch.randn(6, 4, 32, requires_grad=True)
    for view in (whole.transpose(0, 1), whole[:, 1:3], whole[..., ::2]):
        weight = torch.rand(view.shape[-1])
        assert torch.allclose(rms_norm(view, weight, EPS), plain_norm(view, weight), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needed", [(True, True, True), (True, True, False), (False, False, True)], ids=str)
def test_gated_products_and_their_gradients_are_torch_s(dtype, needed):
    torch.manual_seed(0)
    parts = (torch.randn(2, 9, 40), torch.randn(2, 9, 40), torch.randn(24, 40))
    inputs = tuple(part.to(dtype).requires_grad_(own) for part, own in zip(parts, needed, strict=True))
    exact = gradients(plain_gate, tuple(part.double() for part in inputs))
    theirs, ours = gradients(plain_gate, inputs), gradients(gated_linear, inputs)
    assert len(ours) == 1 + sum(needed)
    for found, plain, wanted in zip(ours, theirs, exact, strict=True):
        assert found.dtype == dtype and found.shape == wanted.shape
        assert off_by(found, wanted) < 1.1 * off_by(plain, wanted) + 1e-6


def test_autocast_is_followed():
    parts = [torch.randn(9, 40, requires_grad=True) for _ in range(2)] + [torch.randn(24, 40, requires_grad=True)]
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = gradients(gated_linear, tuple(parts)), gradients(plain_gate, tuple(parts))
    assert found[0].dtype == torch.bfloat16 and all(grad.dtype == torch.float32 for grad in found[1:])
    assert all(off_by(ours, theirs.double()) < 0.01 for ours, theirs in zip(found, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_waits_for_the_backward_is_what_went_in(dtype):
    x = torch.randn(50, 96, dtype=dtype, requires_grad=True)
    norm = RMSNorm(96, EPS).to(dtype)
    assert kept_bytes(norm, x) == x.nbytes + 4 * 50  # and a float32 number a row
    feed_forward = FeedForward(ModelConfig(hidden_size=96), 160).to(dtype)
    assert kept_bytes(feed_forward, x) == x.nbytes + 2 * 50 * 160 * x.itemsize  # gate and up


def test_where_nothing_is_trained_or_a_compiler_looks_on_it_is_torch_s(monkeypatch):
    x = torch.randn(4, 32)
    assert is_recomputed(x) and not is_recomputed(x.to("meta"))
    with torch.no_grad():
        assert not is_recomputed(x)

    def refuse(*_: Any) -> None:
        raise AssertionError("ours was called")

    monkeypatch.setattr(layers, "rms_norm", refuse)
    monkeypatch.setattr(layers, "gated_linear", refuse)
    norm, feed_forward = RMSNorm(32, EPS), FeedForward(ModelConfig(hidden_size=32), 64)
    with torch.no_grad():
        assert torch.equal(norm(x), plain_norm(x, norm.weight))
        feed_forward(x)
    torch.compile(norm, backend="eager", fullgraph=True)(x)
    torch.compile(feed_forward, backend="eager", fullgraph=True)(x)
    with pytest.raises(AssertionError, match="ours was called"):
        norm(x)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("preset", ["tiny", "tiny-moe"])
def test_a_model_learns_what_it_would_by_torch_s_layers(monkeypatch, preset, checkpointing):
    """Loss and every gradient, in rows longer than a chunk of the norm."""
    monkeypatch.setattr(cpu_layers, "_CHUNK", 1000)
    torch.manual_seed(0)
    model = MiniMindForCausalLM(dataclasses.replace(PRESETS[preset], vocab_size=300)).train()
    model.set_activation_checkpointing(checkpointing)
    tokens = torch.randint(0, 300, (2, 40))

    def learn() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        output = model(tokens, tokens)
        output.loss.backward()
        return output.loss.detach(), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    loss, found = learn()
    monkeypatch.setattr(layers, "is_recomputed", lambda x: False)
    plain_loss, plain = learn()
    assert torch.allclose(loss, plain_loss, rtol=1e-6) and len(found) == len(plain) > 10
    assert all(off_by(ours, theirs.double()) < 1e-5 for ours, theirs in zip(found, plain, strict=True))
