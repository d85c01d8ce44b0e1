"""Documents without a mask, against the mask."""

import dataclasses
import itertools

import pytest
import torch
from document_borders import BORDERS

from minimind.model import PRESETS, MiniMindForCausalLM
from minimind.model.kernels.apply import VARIABLE, apply_kernels
from minimind.model.kernels.attention import DocumentMask, batch_documents

TINY = dataclasses.replace(PRESETS["tiny"], vocab_size=120, num_hidden_layers=2)


def make_model(**changes):
    torch.manual_seed(0)
    return MiniMindForCausalLM(dataclasses.replace(TINY, initializer_range=0.2, **changes)).eval()


def tokens(*shape):
    return torch.randint(3, TINY.vocab_size, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS.keys())
def test_batched_documents_are_read_as_if_alone_and_learn_as_masked_ones(borders):
    batched, masked = make_model(), make_model()
    apply_kernels(batched, "cpu")
    input_ids, labels = tokens(2, 150), tokens(2, 150)
    cu_seqlens = torch.tensor(borders, dtype=torch.int32)
    with torch.no_grad():
        logits = batched(input_ids, cu_seqlens=cu_seqlens).logits.flatten(0, 1)
        for start, end in itertools.pairwise(borders):
            alone = masked(input_ids.flatten()[None, start:end]).logits[0]
            torch.testing.assert_close(logits[start:end], alone, rtol=1e-4, atol=1e-4)
    losses = [model(input_ids, labels, cu_seqlens=cu_seqlens).loss for model in (batched, masked)]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    for left, right in zip(batched.parameters(), masked.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-6)


def test_batches_hold_every_token_once_and_skip_the_masked_work():
    mask = batch_documents(torch.tensor(BORDERS["mixed"], dtype=torch.int32))
    flat = torch.cat([batch.flatten() for batch in mask.batches])
    assert flat[mask.inverse].tolist() == list(range(300))
    assert sum(batch.shape[0] * batch.shape[1] ** 2 for batch in mask.batches) < 2 * 150 * 150


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS.keys())
def test_variable_length_kernel_gives_the_masked_result(borders, monkeypatch):
    model = make_model().cuda().bfloat16()
    apply_kernels(model, "cuda")
    input_ids, labels = tokens(2, 150).cuda(), tokens(2, 150).cuda()
    cu_seqlens = torch.tensor(borders, dtype=torch.int32, device="cuda")
    mask = model.model.document_mask(cu_seqlens, model.model.embed_tokens(input_ids))
    assert isinstance(mask, DocumentMask) and mask.cu_seqlens is not None
    by_kernel = model(input_ids, cu_seqlens=cu_seqlens).logits
    model(input_ids, labels, cu_seqlens=cu_seqlens).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    monkeypatch.setenv(VARIABLE, "plain")
    apply_kernels(model, "cuda")
    torch.testing.assert_close(by_kernel, model(input_ids, cu_seqlens=cu_seqlens).logits, rtol=5e-2, atol=5e-2)
