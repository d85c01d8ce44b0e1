"""The loss inside the output matrix, against torch's plain cross-entropy."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from minimind.model import PRESETS, MiniMindForCausalLM
from minimind.model.loss import LMHead

TINY = PRESETS["tiny"]


@pytest.fixture(params=[1, 7, 64], ids=lambda rows: f"{rows} rows a chunk")
def chunk_rows(request, monkeypatch):
    monkeypatch.setattr(LMHead, "chunk_logits", request.param * 50)
    return request.param


def make_case(dtype=torch.float32, z_loss_coef=0.0):
    torch.manual_seed(0)
    head = LMHead(dataclasses.replace(TINY, vocab_size=50, z_loss_coef=z_loss_coef, initializer_range=0.5)).to(dtype)
    states = torch.randn(3, 11, TINY.hidden_size, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 50, (3, 11))
    labels[0, :4] = -100
    labels[2, -1] = -100
    return head, states, labels


def plain_loss(head, states, labels, reduction, z_loss_coef=0.0):
    logits = F.linear(states, head.weight).float().flatten(0, 1)
    total = F.cross_entropy(logits, labels.flatten(), reduction="sum")
    total = total + z_loss_coef * (logits.logsumexp(-1).square() * (labels.flatten() != -100)).sum()
    return total if reduction == "sum" else total / (labels != -100).sum()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("z_loss_coef", [0.0, 0.1])
def test_value_and_gradient_are_those_of_cross_entropy(chunk_rows, reduction, z_loss_coef):
    head, states, labels = make_case(z_loss_coef=z_loss_coef)
    value = head(states, labels, reduction)
    expected = plain_loss(head, states, labels, reduction, z_loss_coef)
    torch.testing.assert_close(value, expected)
    # The gradient of a scaled loss, as under accumulation or a loss scale.
    found = torch.autograd.grad(value * 3, (states, head.weight))
    wanted = torch.autograd.grad(expected * 3, (states, head.weight))
    for left, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_as_close_to_the_truth_as_the_plain_loss(chunk_rows):
    head, states, labels = make_case(torch.bfloat16)
    value = head(states, labels)
    assert value.dtype == torch.float32
    found = torch.autograd.grad(value, (states, head.weight))
    assert [grad.dtype for grad in found] == [torch.bfloat16, torch.bfloat16]
    exact_head, exact_states = head.float(), states.detach().float().requires_grad_()
    expected = plain_loss(exact_head, exact_states, labels, "mean")
    torch.testing.assert_close(value, expected, rtol=1e-2, atol=0)
    for left, right in zip(found, torch.autograd.grad(expected, (exact_states, exact_head.weight)), strict=True):
        assert (left.float() - right).norm() < 0.02 * right.norm()


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_weights():
    head, states, labels = make_case()
    exact = torch.autograd.grad(plain_loss(head, states, labels, "mean"), (states, head.weight))
    with torch.autocast("cpu", torch.bfloat16):
        value = head(states, labels)
    found = torch.autograd.grad(value, (states, head.weight))
    assert value.dtype == torch.float32
    for left, right in zip(found, exact, strict=True):
        assert left.dtype == torch.float32
        assert (left - right).norm() < 0.02 * right.norm()
        assert not torch.equal(left, right)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_batch_without_targets_costs_nothing(chunk_rows, reduction):
    head, states, labels = make_case(z_loss_coef=0.1)
    value = head(states, torch.full_like(labels, -100), reduction)
    assert value.item() == 0
    for grad in torch.autograd.grad(value, (states, head.weight)):
        assert torch.count_nonzero(grad) == 0


def test_evaluation_leaves_the_z_loss_out_and_keeps_no_gradient():
    head, states, labels = make_case(z_loss_coef=0.1)
    head.eval()
    torch.testing.assert_close(head(states, labels), plain_loss(head, states, labels, "mean"))
    with torch.no_grad():
        value = head(states, labels)
    assert not value.requires_grad
    torch.testing.assert_close(value, plain_loss(head, states, labels, "mean"))


def test_gradient_reaches_what_wants_it_alone():
    head, states, labels = make_case()
    wanted = torch.autograd.grad(plain_loss(head, states, labels, "mean"), head.weight)[0]
    torch.testing.assert_close(torch.autograd.grad(head(states.detach(), labels), head.weight)[0], wanted)
    head.weight.requires_grad_(False)
    wanted = torch.autograd.grad(plain_loss(head, states, labels, "mean"), states)[0]
    torch.testing.assert_close(torch.autograd.grad(head(states, labels), states)[0], wanted)


def test_logits_never_exist_as_a_whole(monkeypatch):
    monkeypatch.setattr(LMHead, "chunk_logits", 4 * 50)
    head, states, labels = make_case()
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.shape[1:] == (50,) and len(found) != TINY.hidden_size:
                largest = max(largest, len(found))
            return found

    with Watch():
        head(states, labels).backward()
    assert largest == 4


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_whole_model_has_the_plain_gradients(tied, checkpointing):
    torch.manual_seed(0)
    model = MiniMindForCausalLM(dataclasses.replace(TINY, tie_word_embeddings=tied))
    model.set_activation_checkpointing(checkpointing)
    input_ids, labels = torch.randint(0, TINY.vocab_size, (2, 2, 16))
    labels[0, :5] = -100
    value = model(input_ids, labels).loss
    expected = F.cross_entropy(model(input_ids).logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(value, expected)
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(expected, parameters)
    for left, right in zip(torch.autograd.grad(value, parameters), wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-7)


def test_an_unknown_reduction_is_refused():
    head, states, labels = make_case()
    with pytest.raises(ValueError, match="average"):
        head(states, labels, "average")
