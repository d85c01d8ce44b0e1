"""Choose the next token from logits: greedy, temperature, top-k, top-p, min-p and repetition penalty.

Vectorised over a batch; each row has its own options and random numbers.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated

import torch
from torch import Tensor

from minimind.schema import ABOVE_0, AT_LEAST_0, AT_LEAST_1, Limits, check_fields


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is drawn. An invalid value raises `UserError` at construction."""

    temperature: Annotated[float, AT_LEAST_0] = 0.8
    """Divides the scores before the draw; 0 always takes the most likely token (greedy)."""
    top_k: Annotated[int | None, AT_LEAST_1] = None
    """Draw among this many most likely tokens only; None: no limit."""
    top_p: Annotated[float | None, Limits(above=0, at_most=1)] = 0.95
    """Draw among the fewest most likely tokens that have this probability together (arXiv 1904.09751); None: all."""
    min_p: Annotated[float | None, Limits(at_least=0, at_most=1)] = None
    """Leave out tokens less likely than this share of the most likely one (arXiv 2407.01082); None: none."""
    repetition_penalty: Annotated[float, ABOVE_0] = 1.0
    """Above 1: makes tokens of the prompt and the answer less likely (arXiv 1909.05858)."""
    seed: int | None = None
    """The same seed, the same draws, on any device; row i of a batch draws with seed + i. None: random."""

    def __post_init__(self) -> None:
        check_fields(SamplingOptions, {field.name: getattr(self, field.name) for field in fields(SamplingOptions)})


class Sampler:
    """Draws the next token of each row.

    Args:
        options: one for each row, with the row's own `seed`.
        prompts: token ids that each row has read so far, for the repetition penalty.
        vocab_size: larger ids are never drawn (a model's matrix may have more rows than its tokenizer has tokens).
    """

    def __init__(
        self,
        options: Sequence[SamplingOptions],
        prompts: Sequence[Sequence[int]],
        vocab_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, device=device)[:, None]  # (B, 1)

        self.vocab_size = vocab_size
        self._device = device
        self._is_greedy = [row.temperature == 0 for row in options]
        self._randoms = [random.Random(row.seed) for row in options]
        self._temperature = column([row.temperature or 1.0 for row in options])
        self._top_k = column([vocab_size if row.top_k is None else row.top_k for row in options])
        self._top_p = column([2.0 if row.top_p is None else row.top_p for row in options])
        self._min_p = column([row.min_p or 0.0 for row in options])
        self._penalty = column([row.repetition_penalty for row in options])
        self._seen: Tensor | None = None  # (B, vocab_size) bool, kept only where a row has a penalty
        if any(row.repetition_penalty != 1 for row in options):
            self._seen = torch.zeros(len(options), vocab_size, dtype=torch.bool)
            for seen, prompt in zip(self._seen, prompts, strict=True):
                seen[torch.tensor(prompt, dtype=torch.long)] = True
            self._seen = self._seen.to(device)

    def draw(self, logits: Tensor) -> Tensor:
        """The next token ids (B,) int64 for the scores (B, V >= vocab_size) of the newest tokens."""
        scores = self._penalize(logits[:, : self.vocab_size].float())
        if all(self._is_greedy):
            tokens = scores.argmax(dim=-1)
        else:
            tokens = self._draw_random(scores)
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], True)
        return tokens

    def _penalize(self, scores: Tensor) -> Tensor:
        if self._seen is None:
            return scores
        penalized = torch.where(scores > 0, scores / self._penalty, scores * self._penalty)
        return torch.where(self._seen, penalized, scores)

    def _draw_random(self, scores: Tensor) -> Tensor:
        scores, token_ids = (scores / self._temperature).sort(dim=-1, descending=True, stable=True)  # (B, V)
        ranks = torch.arange(self.vocab_size, device=scores.device)
        probs = scores.masked_fill(ranks >= self._top_k, float("-inf")).double().softmax(dim=-1)
        before = probs.cumsum(dim=-1) - probs  # probability of all likelier tokens
        probs = probs * ((before < self._top_p) & (probs >= self._min_p * probs[:, :1]))
        cumulated = probs.cumsum(dim=-1)
        # One number in [0, 1) a row picks by inversion; 0 picks the likeliest, which is how a greedy row takes part.
        draws = [0.0 if g else r.random() for g, r in zip(self._is_greedy, self._randoms, strict=True)]
        drawn = torch.tensor(draws, dtype=torch.float64, pin_memory=scores.is_cuda)
        threshold = drawn.to(scores.device, non_blocking=True)[:, None] * cumulated[:, -1:]
        chosen = (cumulated <= threshold).sum(dim=-1, keepdim=True)
        last = (probs > 0).sum(dim=-1, keepdim=True) - 1  # rounding must not select a token that was cut off
        return token_ids.gather(1, torch.minimum(chosen, last))[:, 0]
