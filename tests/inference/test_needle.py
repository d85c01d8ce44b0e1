"""Needles in a haystack: where they lie, and what is found of them."""

import copy
import dataclasses
import json

import pytest
import torch
from tokenizers_for_tests import TEXT

from minimind.errors import UserError
from minimind.evaluate import main
from minimind.inference import needle
from minimind.inference.evaluation import shards_of_texts
from minimind.inference.likelihood import log_likelihood
from minimind.inference.needle import NeedleOptions, find_needles, make_test, read_in_pieces, score_test
from minimind.model import CausalLMOutput, KVCache, MiniMindForCausalLM


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    """Text to hide needles in."""
    file = tmp_path_factory.mktemp("haystack") / "text.txt"
    file.write_text(TEXT[:900].replace(". ", ".\n"), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def haystack(model, text_file):
    """The same as shards."""
    with shards_of_texts([text_file], model[1].file) as reader:
        yield reader


SHORT = "{key}: {value}."


class Perfect(MiniMindForCausalLM):
    """Knows where the question's key stood before, and is certain of what followed it there."""

    def forward(self, input_ids, labels=None, *, cache, **_):
        self.model(input_ids, cache=cache)
        read = [*self.seen[: cache.length - input_ids.shape[1]], *input_ids[0].tolist()]
        logits = torch.zeros(1, input_ids.shape[1], self.config.vocab_size)
        for place in range(input_ids.shape[1]):
            so_far = read[: len(read) - input_ids.shape[1] + place + 1]
            logits[0, place, self.follow(so_far)] = 9.0
        return CausalLMOutput(logits=logits)

    def follow(self, so_far: list[int]) -> int:
        """The token after the longest earlier occurrence of the end of `so_far`."""
        for size in range(12, 0, -1):
            for start in range(len(so_far) - size - 1, -1, -1):
                if so_far[start : start + size] == so_far[-size:]:
                    return so_far[start + size]
        return 0


def make(reader, tokenizer, length=200, depth=50.0, sample=0, **options):
    return make_test(tokenizer, reader, NeedleOptions(needle_template=SHORT, **options), length, depth, sample)


def test_a_needle_lies_at_its_depth_and_the_prompt_is_as_long_as_asked(model, haystack):
    tokenizer = model[1]
    for sample in range(3):
        tests = [make(haystack, tokenizer, depth=depth, sample=sample) for depth in (0, 50, 100)]
        texts = [tokenizer.decode(test.prompt) for test in tests]
        key = texts[0].rsplit("\n", 1)[1].removesuffix(":")
        value = tokenizer.decode(tests[0].answers[0]).strip()
        places = [text.index(f"\n{key}: {value}.\n") / len(text) for text in texts]
        assert places[0] < 0.2 and 0.3 < places[1] < 0.7 and places[2] > 0.8
        for test, text in zip(tests, texts, strict=True):
            assert len(test.prompt) + max(map(len, test.answers)) == 200
            assert text.endswith(f"\n{key}:") and text.count(f"{key}:") == 2, "the needle, and the question"
            hidden = [tokenizer.decode(answer).strip() in text for answer in test.answers]
            assert hidden == [True] * 4 + [False] * 6, "the needle's value and those of three others stand in the text"
    assert make(haystack, tokenizer) == make(haystack, tokenizer) != make(haystack, tokenizer, needle_seed=1)


def test_values_may_be_words(model, haystack):
    test = make(haystack, model[1], needle_values="word", needle_others=0)
    values = [model[1].decode(answer).strip() for answer in test.answers]
    assert len(set(values)) == 10 and all(len(value) == 4 and value.isalpha() for value in values)
    assert [f": {value}." in model[1].decode(test.prompt) for value in values] == [True] + [False] * 9


def test_a_text_that_is_too_short_begins_again(model, haystack):
    tokenizer = model[1]
    prompt = make(haystack, tokenizer, length=3 * haystack.num_tokens).prompt
    assert haystack.manifest.eos_token_id not in prompt and tokenizer.decode(prompt).count("quick brown") > 2


def test_a_prompt_is_read_in_pieces_as_at_once(model, monkeypatch):
    prompt = torch.randint(3, model[0].config.vocab_size, (300,)).tolist()
    caches = []
    for longest in (2048, 64):
        monkeypatch.setattr(needle, "LONGEST_PIECE", longest)
        caches.append(KVCache(model[0].config, 1, 320))
        read_in_pieces(model[0], caches[-1], prompt)
    assert caches[0].length == caches[1].length == 300
    torch.testing.assert_close(caches[0].keys, caches[1].keys, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(caches[0].values, caches[1].values, atol=1e-5, rtol=1e-4)


def test_the_figures_of_a_test_are_those_of_one_forward(model, haystack):
    test = make(haystack, model[1])
    exact, first, rank, loss = score_test(model[0], KVCache(model[0].config, 1, 200), test)
    scores = [log_likelihood(model[0], test.prompt, answer) for answer in test.answers]
    assert loss == pytest.approx(-scores[0] / len(test.answers[0]), rel=1e-4)
    assert rank == sorted(scores, reverse=True).index(scores[0]) + 1 and first == (rank == 1) and exact == 0


def test_a_model_that_looks_back_finds_every_needle(model, haystack):
    tokenizer = model[1]
    perfect = Perfect(model[0].config)
    for sample in range(3):
        test = make(haystack, tokenizer, sample=sample)
        perfect.seen = test.prompt
        exact, first, rank, loss = score_test(perfect, KVCache(model[0].config, 1, 200), test)
        assert (exact, first, rank) == (1, 1, 1) and loss < 0.1


def test_ranks_share_the_needles(model, haystack, monkeypatch):
    options = NeedleOptions(
        needle_lengths=(100,), needle_depths=(0, 100), needle_samples=3, needle_template=SHORT, needle_others=1
    )
    alone = find_needles(*model, haystack, options)
    parts = []
    monkeypatch.setattr(needle, "all_reduce_sum", lambda sums: parts.append(sums) or sums)
    for rank in range(2):
        find_needles(*model, haystack, options, rank=rank, world_size=2)
    means = (sum(parts) / 3).tolist()
    assert means == [pytest.approx([cell.exact, cell.first, cell.rank, cell.loss]) for cell in alone]


def test_the_command_hides_needles(capsys, exported, text_file, tmp_path):
    flags = ["--checkpoint", exported, "--text", text_file, "--device", "cpu", "--needle", "--needle-template", SHORT]
    flags += ["--needle-lengths", 200, 100, "--needle-depths", 0, 50, "--needle-samples", 2]
    main([str(flag) for flag in flags])
    shown = capsys.readouterr().out
    written = json.loads((exported / "needle.json").read_text())
    assert [(cell["length"], cell["depth"]) for cell in written["cells"]] == [(200, 0), (200, 50), (100, 0), (100, 50)]
    assert all(1 <= cell["rank"] <= 10 and cell["loss"] > 0 for cell in written["cells"])
    assert written["needle_template"] == SHORT and "tokens    0%   50%  mean" in shown
    main([str(flag) for flag in [*flags, "--output", tmp_path / "again.json"]])
    assert capsys.readouterr().out.split("written")[0] == shown.split("written")[0]


def test_the_usual_lengths_are_those_of_training(model):
    assert needle.usual_lengths(model[0]) == (128, 256, 512)
    stretched = copy.copy(model[0])
    stretched.config = dataclasses.replace(
        model[0].config, rope_original_max_position_embeddings=64, rope_scaling_factor=4.0
    )
    assert needle.usual_lengths(stretched) == (64, 128, 256)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--needle", "--needle-lengths", "513"], "needle_lengths: 513 is beyond the model's 512 positions"),
        (["--needle", "--needle-lengths", "40"], "needle_lengths: 40 tokens have no room beside"),
        (["--needle", "--needle-depths", "101"], "needle_depths: 101 is not a percentage"),
        (["--needle", "--needle-template", "{value} of {key}"], "must hold {key} and after it {value}"),
        (["--needle", "--needle-others", "10"], "needle_others: 10"),
        (["--needle-samples", "3"], "needle_samples: has no effect without --needle"),
    ],
)
def test_a_wrong_flag_is_one_line(exported, text_file, flags, said):
    with pytest.raises(UserError) as caught:
        main(["--checkpoint", str(exported), "--text", str(text_file), "--device", "cpu", *flags])
    assert said in str(caught.value) and "\n" not in str(caught.value)
