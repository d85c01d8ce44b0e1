"""Text that can be shown while it grows."""

import random

import pytest
from tokenizers_for_tests import KINDS

from minimind.data.tokenizer import Tokenizer, load_tokenizer
from minimind.inference.text_stream import REPLACEMENT, TextStream

TEXTS = ["the quick fox", "你好，世界！", "😀👨‍👩‍👧 x 龘龘", " leading\n\n  and\ttabs ", "éß\u0301 a", "<|im_start|>"]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    return load_tokenizer(KINDS[request.param](tmp_path_factory.mktemp("tokenizer")))


def pieces_of(stream: TextStream, token_ids: list[int]) -> list[str]:
    return [*(stream.push(token_id) for token_id in token_ids), stream.finish()]


def test_pieces_join_to_the_decoded_text(tokenizer):
    for text in TEXTS:
        prompt, answer = tokenizer.encode("the fox"), tokenizer.encode(text)
        stream = TextStream(tokenizer, prompt)
        pieces = pieces_of(stream, answer)
        whole = tokenizer.decode(prompt + answer)
        assert "".join(pieces) == stream.text == whole[len(tokenizer.decode(prompt)) :]
        assert len(answer) < 3 or sum(map(bool, pieces)) > 1  # it came piece by piece


def test_half_a_character_is_never_shown(tokenizer):
    for text in TEXTS:
        for piece in pieces_of(TextStream(tokenizer), tokenizer.encode(text)):
            assert REPLACEMENT not in piece


def test_a_character_that_never_ends_comes_last(tokenizer):
    token_ids = tokenizer.encode("fox 龘")[:-1]
    stream = TextStream(tokenizer)
    pieces = [stream.push(token_id) for token_id in token_ids]
    assert REPLACEMENT not in "".join(pieces)
    assert stream.finish().startswith(REPLACEMENT) and stream.text == tokenizer.decode(token_ids)


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_random_tokens_join_to_the_decoded_text(kind, tmp_path):
    # Not for byte fallback in a tokenizer.json: it decodes an invalid run of bytes differently as the run grows.
    tokenizer = load_tokenizer(KINDS[kind](tmp_path))
    rng = random.Random(0)
    for _ in range(200):
        token_ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 30))]
        stream = TextStream(tokenizer)
        assert "".join(pieces_of(stream, token_ids)) == stream.text == tokenizer.decode(token_ids)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["fox"], "the quick brown "),
        (["quick", "brown", "the lazy"], "the "),
        (["brown", "wn fox j"], "the quick "),
        (["the quick"], ""),
        (["ox jumps o"], "the quick brown f"),
        (["nowhere", "overt"], "the quick brown fox jumps over the lazy dog"),
        (["dog!"], "the quick brown fox jumps over the lazy dog"),
        ([""], "the quick brown fox jumps over the lazy dog"),
    ],
)
def test_nothing_of_a_stop_text_is_ever_shown(tokenizer, stop, expected):
    token_ids = tokenizer.encode("the quick brown fox jumps over the lazy dog")
    stream = TextStream(tokenizer, stop=stop)
    shown = ""
    for token_id in token_ids:
        shown += stream.push(token_id)
        assert expected.startswith(shown)
    shown += stream.finish()
    assert shown.lstrip() == stream.text.lstrip() == expected.lstrip()
    assert stream.is_stopped == (not expected.endswith("dog"))
    assert stream.push(token_ids[0]) == "" == stream.finish() or not stream.is_stopped


def test_the_first_of_several_stop_texts_in_one_token_counts(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "decode", lambda token_ids: "one two three" * len(token_ids))
    stream = TextStream(tokenizer, stop=["three", "two", "ee"])
    assert stream.push(5) == "one " and stream.is_stopped


def test_a_stop_text_may_be_chinese(tokenizer):
    stream = TextStream(tokenizer, stop=["世界"])
    text = "".join(pieces_of(stream, tokenizer.encode("你好，世界！")))
    assert text.strip() == "你好，" and stream.is_stopped
