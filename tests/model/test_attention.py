"""Every way attention is computed, against one plain reference."""

import dataclasses
import itertools

import pytest
import torch
from document_borders import BORDERS

from minimind.errors import UserError
from minimind.model import PRESETS, KVCache, MiniMindForCausalLM
from minimind.model.attention import explicit_attention, fused_attention
from minimind.model.attention_mask import AttentionMask, causal_mask, document_mask, segment_positions

TINY = dataclasses.replace(PRESETS["tiny"], vocab_size=120, num_hidden_layers=2)


def make_model(**changes):
    torch.manual_seed(0)
    return MiniMindForCausalLM(dataclasses.replace(TINY, initializer_range=0.2, **changes)).eval()


def tokens(*shape):
    return torch.randint(3, TINY.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def reference(queries, keys, values, mask):
    """One query head at a time, in float64."""
    group = queries.shape[1] // keys.shape[1]
    out = torch.empty_like(queries, dtype=torch.float64)
    for head in range(queries.shape[1]):
        scores = queries[:, head].double() @ keys[:, head // group].double().mT / queries.shape[-1] ** 0.5
        out[:, head] = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ values[:, head // group].double()
    return out.float()


@pytest.mark.parametrize("attend", [fused_attention, explicit_attention])
@pytest.mark.parametrize("num_kv_heads", [6, 3, 2, 1])
@pytest.mark.parametrize(("num_read", "num_new"), [(0, 9), (5, 4), (8, 1)])
def test_heads_and_lengths(attend, num_kv_heads, num_read, num_new):
    length = num_read + num_new
    queries = torch.randn(2, 6, num_new, 16)
    keys, values = torch.randn(2, 2, num_kv_heads, length, 16)
    allowed = causal_mask(num_new, num_read, None, queries.device)
    mask = torch.arange(length) <= torch.arange(num_read, length)[:, None]
    expected = reference(queries, keys, values, mask)
    torch.testing.assert_close(attend(queries, keys, values, allowed, 0.0), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_plain_attention_gives_the_fused_losses_and_gradients(num_kv_heads, qk_norm):
    fused = make_model(num_key_value_heads=num_kv_heads, qk_norm=qk_norm)
    plain = make_model(num_key_value_heads=num_kv_heads, qk_norm=qk_norm, flash_attn=False)
    input_ids, labels = tokens(2, 20), tokens(2, 20)
    losses = [model(input_ids, labels).loss for model in (fused, plain)]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    for left, right in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize("cuts", [(1, 2, 3), (7,), (6, 7, 8), (10,)])
def test_cached_pieces_give_the_whole(flash_attn, cuts):
    model, input_ids = make_model(flash_attn=flash_attn), tokens(2, 11)
    whole = model(input_ids).logits
    cache = KVCache(model.config, 2, 12)
    pieces = [model(piece, cache=cache).logits for piece in input_ids.tensor_split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-4)
    assert cache.length == 11
    cache.length = 4  # forget, and read again
    torch.testing.assert_close(model(input_ids[:, 4:9], cache=cache).logits, whole[:, 4:9], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flash_attn", [True, False])
def test_left_padding_changes_nothing(flash_attn):
    model = make_model(flash_attn=flash_attn)
    long, short = tokens(1, 9), tokens(1, 5)
    input_ids = torch.cat((long, torch.cat((torch.zeros(1, 4, dtype=torch.long), short), dim=1)))
    attention_mask = torch.ones(2, 9, dtype=torch.long)
    attention_mask[1, :4] = 0
    expected_long, expected_short = model(long).logits[0], model(short).logits[0]

    logits = model(input_ids, attention_mask=attention_mask).logits
    torch.testing.assert_close(logits[0], expected_long, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1, 4:], expected_short, rtol=1e-4, atol=1e-4)
    assert logits.isfinite().all()

    cache = KVCache(model.config, 2, 9)
    for start, end in ((0, 6), (6, 7), (7, 9)):
        piece = model(input_ids[:, start:end], attention_mask=attention_mask[:, :end], cache=cache).logits
        torch.testing.assert_close(piece[0], expected_long[start:end], rtol=1e-4, atol=1e-4)
        real = max(start, 4)
        torch.testing.assert_close(piece[1, real - start :], expected_short[real - 4 : end - 4], rtol=1e-4, atol=1e-4)


def test_a_full_cache_and_too_long_a_sequence_are_refused():
    model, input_ids = make_model(), tokens(1, 6)
    cache = KVCache(model.config, 1, 8)
    model(input_ids, cache=cache)
    with pytest.raises(UserError, match="max_length=8"):
        model(input_ids[:, :3], cache=cache)
    assert cache.length == 6
    with pytest.raises(UserError, match="max_position_embeddings=512"):
        model(tokens(1, 513))


@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS.keys())
@pytest.mark.parametrize("flash_attn", [True, False])
@torch.no_grad()
def test_documents_are_read_as_if_alone(borders, flash_attn):
    model, input_ids = make_model(flash_attn=flash_attn), tokens(2, 150)
    cu_seqlens = torch.tensor(borders, dtype=torch.int32)
    logits = model(input_ids, cu_seqlens=cu_seqlens).logits.flatten(0, 1)
    for start, end in itertools.pairwise(borders):
        alone = model(input_ids.flatten()[None, start:end]).logits[0]
        torch.testing.assert_close(logits[start:end], alone, rtol=1e-4, atol=1e-4)


def test_the_mask_keeps_attention_inside_documents():
    cu_seqlens = torch.tensor(BORDERS["mixed"], dtype=torch.int32)
    mask = document_mask(cu_seqlens, torch.Size((2, 150)))
    queries, keys = torch.randn(2, 4, 150, 16), torch.randn(2, 2, 150, 16)
    expected = explicit_attention(queries, keys, keys, mask, 0.0)
    for row in range(2):
        borders = [border - 150 * row for border in BORDERS["mixed"] if 150 * row <= border <= 150 * (row + 1)]
        for start, end in itertools.pairwise(borders):
            piece = [x[row : row + 1, :, start:end] for x in (queries, keys, keys)]
            alone = explicit_attention(*piece, AttentionMask(), 0.0)
            torch.testing.assert_close(expected[row : row + 1, :, start:end], alone)


def test_positions_count_from_the_start_of_a_document():
    borders = BORDERS["mixed"]
    assert segment_positions(torch.tensor(borders, dtype=torch.int32), 300).tolist() == [
        token - max(border for border in borders if border <= token) for token in range(300)
    ]


def test_attention_dropout_acts_in_training_only():
    model, input_ids = make_model(attention_dropout=0.5), tokens(1, 12)
    assert torch.equal(model(input_ids).logits, model(input_ids).logits)
    model.train()
    assert not torch.equal(model(input_ids).logits, model(input_ids).logits)
