"""Choose the next token from logits: greedy, temperature, top-k, top-p, min-p and repetition penalty.

Vectorised over a batch; each row has its own options and random numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Annotated, Any

import torch
from torch import Tensor

from minimind.accelerator import has_streams, widest_float
from minimind.schema import ABOVE_0, AT_LEAST_0, AT_LEAST_1, Limits, check_fields


@dataclass(frozen=True)
class GenerationOptions:
    """How a continuation is sampled, and where it ends. An invalid value raises `UserError` at construction."""

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
    max_new_tokens: Annotated[int, AT_LEAST_1] = 256
    """Limit of a continuation, in tokens."""
    stop: tuple[str, ...] = ()
    """A continuation ends before any of these texts."""
    stop_token_ids: tuple[int, ...] | None = None
    """A continuation ends before any of these ids; None: end of document and end of turn."""

    def __post_init__(self) -> None:
        check_fields(type(self), vars(self))


def to_device(values: Sequence[Any], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor of numbers, copied to a device with streams without waiting for it."""
    pinned = has_streams(device)
    return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(device, non_blocking=pinned)


def draw(
    logits: Tensor,
    options: Sequence[GenerationOptions],
    randoms: Sequence[Random],
    tokens: Sequence[Sequence[int]],
    vocab_size: int,
) -> Tensor:
    """The next token ids (B,) int64 for the logits (B, V) of each row's newest token.

    Args:
        randoms: each row's own random numbers; one is taken a draw, none by a greedy row.
        tokens: what each row has read and drawn so far, for the repetition penalty.
        vocab_size: larger ids are never drawn (a model's matrix may have more rows than its tokenizer has tokens).
    """
    scores = logits.float()
    if any(row.repetition_penalty != 1 for row in options):
        scores = scores.clone()
        for row, option in enumerate(options):
            seen = to_device(tokens[row], scores.device, torch.long)
            found, penalty = scores[row, seen], option.repetition_penalty
            scores[row, seen] = torch.where(found > 0, found / penalty, found * penalty)
    scores = scores[:, :vocab_size]
    if all(row.temperature == 0 for row in options):
        return scores.argmax(dim=-1)
    return _draw_random(scores, options, randoms)


def _draw_random(scores: Tensor, options: Sequence[GenerationOptions], randoms: Sequence[Random]) -> Tensor:
    def column(values: list[float]) -> Tensor:
        return to_device([values], scores.device, dtype).T  # (B, 1)

    vocab_size, dtype = scores.shape[1], widest_float(scores.device)
    temperature = column([row.temperature or 1.0 for row in options]).float()
    top_k = column([vocab_size if row.top_k is None else row.top_k for row in options])
    top_p = column([2.0 if row.top_p is None else row.top_p for row in options])
    min_p = column([row.min_p or 0.0 for row in options])
    scores, token_ids = (scores / temperature).sort(dim=-1, descending=True, stable=True)  # (B, V)
    ranks = torch.arange(vocab_size, device=scores.device)
    probs = scores.masked_fill(ranks >= top_k, float("-inf")).to(dtype).softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs  # probability of all likelier tokens
    probs = probs * ((before < top_p) & (probs >= min_p * probs[:, :1]))
    cumulated = probs.cumsum(dim=-1)
    # One number in [0, 1) a row picks by inversion; 0 picks the likeliest, which is how a greedy row takes part.
    draws = [random.random() if row.temperature else 0.0 for row, random in zip(options, randoms, strict=True)]
    chosen = (cumulated <= column(draws) * cumulated[:, -1:]).sum(dim=-1, keepdim=True)
    last = (probs > 0).sum(dim=-1, keepdim=True) - 1  # rounding must not select a token that was cut off
    return token_ids.gather(1, torch.minimum(chosen, last))[:, 0]
