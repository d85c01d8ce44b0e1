"""The draw of the next token, against what each option promises."""

import dataclasses
import math
from random import Random

import pytest
import torch

from minimind.errors import UserError
from minimind.inference.sampling import GenerationOptions, draw

PLAIN = GenerationOptions(temperature=1.0, top_p=None, seed=0)
GREEDY = GenerationOptions(temperature=0.0)


class Sampler:
    """Rows that draw again and again from scores of `vocab_size` tokens."""

    def __init__(self, options: list[GenerationOptions], prompts: list[list[int]], vocab_size: int) -> None:
        self.options, self.vocab_size = options, vocab_size
        self.randoms = [Random(row.seed) for row in options]
        self.tokens = [list(prompt) for prompt in prompts]

    def draw(self, scores: torch.Tensor) -> torch.Tensor:
        drawn = draw(scores, self.options, self.randoms, self.tokens, self.vocab_size)
        for tokens, token in zip(self.tokens, drawn.tolist(), strict=True):
            tokens.append(token)
        return drawn


def draw_counts(options: GenerationOptions, logits: list[float]) -> torch.Tensor:
    """How often each token is drawn in 20,000 draws, as probabilities."""
    rows, draws = 2000, 10
    sampler = Sampler([dataclasses.replace(options, seed=row) for row in range(rows)], [[]] * rows, len(logits))
    scores = torch.tensor([logits]).expand(rows, -1)
    drawn = torch.cat([sampler.draw(scores) for _ in range(draws)])
    return torch.bincount(drawn, minlength=len(logits)) / (rows * draws)


def close(counts: torch.Tensor, probs: list[float]) -> bool:
    """Within 5 standard deviations of 20,000 draws; what is impossible was never drawn."""
    expected = torch.tensor(probs)
    sigma = (expected * (1 - expected) / 20_000).sqrt()
    return bool(((counts - expected).abs() <= 5 * sigma).all())


LOGITS = [math.log(p) for p in (0.1, 0.4, 0.05, 0.3, 0.15)]


def test_draws_follow_the_probabilities():
    assert close(draw_counts(PLAIN, LOGITS), [0.1, 0.4, 0.05, 0.3, 0.15])


def test_temperature_sharpens_and_flattens():
    squares = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]) ** 2
    assert close(draw_counts(dataclasses.replace(PLAIN, temperature=0.5), LOGITS), (squares / squares.sum()).tolist())
    flat = draw_counts(dataclasses.replace(PLAIN, temperature=1e6), LOGITS)
    assert close(flat, [0.2] * 5)


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.01}, [1]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 3]),
        ({"top_p": 0.84}, [1, 3, 4]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
        ({"min_p": 0.3}, [1, 3, 4]),
        ({"min_p": 1.0}, [1]),
        ({"min_p": 0.0}, [0, 1, 2, 3, 4]),
        ({"top_k": 3, "top_p": 0.5}, [1, 3]),  # among the three left, 0.4 / 0.85 alone is below a half
        ({"top_p": 0.84, "min_p": 0.5}, [1, 3]),
    ],
)
def test_filters_keep_the_likeliest(changes, kept):
    probs = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    expected = torch.zeros(5)
    expected[kept] = probs[kept] / probs[kept].sum()
    assert close(draw_counts(dataclasses.replace(PLAIN, **changes), LOGITS), expected.tolist())


def test_greedy_takes_the_likeliest_whatever_the_filters():
    torch.manual_seed(0)
    scores = torch.randn(4, 50)
    for options in (GREEDY, dataclasses.replace(GREEDY, top_k=3, top_p=0.1, min_p=0.9)):
        assert torch.equal(Sampler([options] * 4, [[]] * 4, 50).draw(scores), scores.argmax(dim=-1))


def test_greedy_and_random_rows_share_a_batch():
    torch.manual_seed(0)
    scores = torch.randn(2, 50)
    sampler = Sampler([GREEDY, PLAIN], [[], []], 50)
    drawn = torch.stack([sampler.draw(scores) for _ in range(50)])
    assert (drawn[:, 0] == scores[0].argmax()).all() and drawn[:, 1].unique().numel() > 5


def test_a_seed_repeats_its_draws_in_any_batch():
    torch.manual_seed(0)
    scores = torch.randn(20, 3, 100)
    seeds = [5, 6, 7]
    rows = [dataclasses.replace(PLAIN, seed=seed) for seed in seeds]
    together = Sampler(rows, [[]] * 3, 100)
    batch = torch.stack([together.draw(step) for step in scores])
    for row in range(3):
        alone = Sampler([rows[row]], [[]], 100)
        assert torch.equal(torch.cat([alone.draw(step[row : row + 1]) for step in scores]), batch[:, row])
    assert not torch.equal(batch[:, 0], batch[:, 1])
    unseeded = [Sampler([dataclasses.replace(PLAIN, seed=None)], [[]], 100) for _ in range(2)]
    draws = [torch.cat([sampler.draw(step[:1]) for step in scores]) for sampler in unseeded]
    assert not torch.equal(*draws)


def test_the_repetition_penalty_weighs_on_prompt_and_answer():
    options = dataclasses.replace(GREEDY, repetition_penalty=2.0)
    sampler = Sampler([options], [[1, 1]], 4)
    scores = torch.tensor([[1.0, 1.9, 0.9, -0.5]])
    # Token 1 stands in the prompt (1.9 / 2 = 0.95), so 0 comes, then 0 is penalized too (0.5), and so on.
    assert [int(sampler.draw(scores)) for _ in range(4)] == [0, 1, 1, 1]
    negative = Sampler([options], [[0]], 2)
    assert int(negative.draw(torch.tensor([[-1.0, -1.5]]))) == 1  # a negative score is multiplied: -2 < -1.5


def test_ids_beyond_the_vocabulary_are_never_drawn():
    scores = torch.tensor([[0.0, 1.0, 50.0, 60.0]])
    for options in (GREEDY, PLAIN):
        sampler = Sampler([options], [[]], 2)
        assert max(int(sampler.draw(scores)) for _ in range(50)) == 1


def test_half_precision_scores_are_enough():
    counts = draw_counts(PLAIN, LOGITS)
    sampler = Sampler([PLAIN], [[]], 5)
    drawn = torch.cat([sampler.draw(torch.tensor([LOGITS], dtype=torch.bfloat16)) for _ in range(2000)])
    assert (torch.bincount(drawn, minlength=5) / 2000 - counts).abs().max() < 0.06


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
    ],
)
def test_an_impossible_value_is_named(name, value):
    with pytest.raises(UserError, match=f"{name}: {value} is not"):
        GenerationOptions(**{name: value})
