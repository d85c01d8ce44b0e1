"""A needle in a haystack: does a model find one sentence in a long text?

A sentence with a random key and a random value stands somewhere in the text, others of other keys elsewhere, and the
text ends with the sentence once more, up to its value (G. Kamradt, github.com/gkamradt/LLMTest_NeedleInAHaystack, 2023;
several keys as in RULER, arXiv 2404.06654). The prompt is read in pieces into a KV cache, so memory beside the cache
does not grow with it.
"""

import dataclasses
import math
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F

from minimind.data.shards import ShardReader
from minimind.data.tokenizer import Tokenizer
from minimind.distributed.collectives import all_reduce_sum
from minimind.errors import UserError
from minimind.inference.likelihood import encode_pair
from minimind.model import KVCache, MiniMindForCausalLM
from minimind.schema import AT_LEAST_0, AT_LEAST_1, Limits, check_fields
from minimind.units import format_table

CANDIDATES = 10
"""Values among which the right one is ranked: those of the other needles, and some that stand nowhere."""
MASK_ELEMENTS = 2**26
LONGEST_PIECE = 2048
"""Tokens of a piece, fewer where a mask of piece x prompt would have more than so many elements."""
_ENDS = ("\n", ".", "!", "?", "。", "！", "？")


@dataclass(frozen=True)
class NeedleOptions:
    """What is hidden, and where."""

    needle_lengths: tuple[int, ...] = ()
    """Tokens of a prompt with its answer [default: a quarter, a half and all of what the model was made for]."""
    needle_depths: tuple[float, ...] = (0, 25, 50, 75, 100)
    """Where the needle lies, in percent of the text before it."""
    needle_samples: Annotated[int, AT_LEAST_1] = 10
    """Needles, each in a text of its own, for every length and depth."""
    needle_others: Annotated[int, Limits(at_least=0, at_most=CANDIDATES - 1)] = 3
    """Needles with other keys in the same text."""
    needle_template: str = "The secret number of {key} is {value}."
    """The needle; the question is the same up to the value."""
    needle_values: Literal["number", "word"] = "number"
    """Five digits, or two syllables like the keys, which a small model copies sooner."""
    needle_seed: Annotated[int, AT_LEAST_0] = 0
    """Decides texts, keys, values and places."""

    def __post_init__(self) -> None:
        check_fields(
            NeedleOptions, {field.name: getattr(self, field.name) for field in dataclasses.fields(NeedleOptions)}
        )
        for depth in self.needle_depths:
            if not 0 <= depth <= 100:
                raise UserError(f"needle_depths: {depth:g} is not a percentage; give 0 (the beginning) to 100")
        names = [name for _, name, _, _ in string.Formatter().parse(self.needle_template) if name is not None]
        if names != ["key", "value"]:
            raise UserError(
                f"needle_template: {self.needle_template!r} must hold {{key}} and after it {{value}}, once each"
            )


@dataclass(frozen=True)
class Cell:
    """What was found at one length and depth, means over the samples."""

    length: int
    depth: float
    exact: float
    """Share of answers that greedy decoding gives in full."""
    first: float
    """Share whose value is the likeliest of `CANDIDATES`; 1 / CANDIDATES by chance."""
    rank: float
    """Place of the right value among them, from 1."""
    loss: float
    """Nats a token of the right value."""


@dataclass(frozen=True)
class NeedleTest:
    """A prompt, its answer, and the wrong ones, as token ids."""

    prompt: list[int]
    answers: list[list[int]]
    """The right one first."""


def find_needles(
    model: MiniMindForCausalLM,
    tokenizer: Tokenizer,
    reader: ShardReader,
    options: NeedleOptions,
    *,
    rank: int = 0,
    world_size: int = 1,
    after_test: Callable[[], object] = lambda: None,
) -> list[Cell]:
    """Every length and depth, in texts cut from `reader`; the same on any number of ranks. Every rank calls this.

    Raises:
        UserError: a length is beyond the model, or too short for the needles.
    """
    lengths = options.needle_lengths or usual_lengths(model)
    for length in lengths:
        if length > (limit := model.config.max_position_embeddings):
            raise UserError(
                f"needle_lengths: {length} is beyond the model's {limit} positions; shorten it, or stretch the context "
                "with --rope-scaling-factor"
            )
    places = [(length, depth) for length in lengths for depth in options.needle_depths]
    totals = torch.zeros(len(places), 4, dtype=torch.float64)
    weight = model.lm_head.weight
    cache = KVCache(model.config, 1, max(lengths), weight.device, weight.dtype)
    was_training = model.training
    model.eval()
    tests = [(place, sample) for place in range(len(places)) for sample in range(options.needle_samples)]
    try:
        for place, sample in tests[rank::world_size]:
            test = make_test(tokenizer, reader, options, *places[place], sample)
            totals[place] += torch.tensor(score_test(model, cache, test), dtype=torch.float64)
            after_test()
    finally:
        model.train(was_training)
    if world_size > 1:
        totals = all_reduce_sum(totals)
    means = (totals / options.needle_samples).tolist()
    return [Cell(*place, *found) for place, found in zip(places, means, strict=True)]


def usual_lengths(model: MiniMindForCausalLM) -> tuple[int, ...]:
    """A quarter, a half and all of the context that the model was trained at, stretched."""
    config = model.config
    longest = config.max_position_embeddings
    if config.rope_original_max_position_embeddings is not None:
        longest = min(longest, int(config.trained_length * config.rope_scaling_factor))
    return tuple(sorted({max(1, longest // part) for part in (4, 2, 1)}))


def make_test(
    tokenizer: Tokenizer, reader: ShardReader, options: NeedleOptions, length: int, depth: float, sample: int
) -> NeedleTest:
    """The prompt of one sample; its text, keys and values are the same at every depth.

    Raises:
        UserError: the needles alone are longer than `length`.
    """
    draw = random.Random(f"{options.needle_seed}:{sample}")
    keys = _draw(draw, _draw_word, options.needle_others + 1)
    values = _draw(draw, _draw_word if options.needle_values == "word" else _draw_number, CANDIDATES)
    before, after = options.needle_template.split("{value}")
    pairs = [encode_pair(tokenizer, "\n" + before.format(key=keys[0]), value) for value in values]
    question, answers = pairs[0][0], [answer for _, answer in pairs]
    needles = [
        tokenizer.encode(f"\n{before.format(key=key)}{value}{after.format()}\n", allow_special=False)
        for key, value in zip(keys, values, strict=False)
    ]
    room = length - sum(map(len, [*needles, question])) - max(map(len, answers))
    if room < 1:
        raise UserError(
            f"needle_lengths: {length} tokens have no room beside {length - room} of needles, question and answer"
        )
    text = _read_text(reader, draw, room)
    closing = {token for token in set(text) if tokenizer.decode([token]).rstrip(" ").endswith(_ENDS)}
    ends = [0, *(place + 1 for place, token in enumerate(text) if token in closing), room]
    # The needle where it is asked for, the others anywhere, all between two sentences.
    wanted = [depth / 100 * room, *(draw.uniform(0, room) for _ in needles[1:])]
    found = [min(ends, key=lambda end: abs(end - place)) for place in wanted]
    prompt, last = [], 0
    for place, needle in sorted(zip(found, needles, strict=True)):
        prompt += text[last:place] + needle
        last = place
    return NeedleTest(prompt + text[last:] + question, answers)


def _draw(draw: random.Random, one: Callable[[random.Random], str], count: int) -> list[str]:
    """So many different ones."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[one(draw)] = None
    return list(found)


def _draw_word(draw: random.Random) -> str:
    return "".join(draw.choice("bdfgklmnprst") + draw.choice("aeiou") for _ in range(2))


def _draw_number(draw: random.Random) -> str:
    return str(draw.randrange(10_000, 100_000))


def _read_text(reader: ShardReader, draw: random.Random, count: int) -> list[int]:
    """So many tokens from a random place, from the beginning again after the last, as one document."""
    if reader.num_tokens <= reader.manifest.total_documents:
        raise UserError(f"{reader.folder} holds no text to hide needles in")
    start, tokens = draw.randrange(reader.num_tokens), list[int]()
    while len(tokens) < count:
        piece = reader.read(start, min(count - len(tokens), reader.num_tokens - start)).tolist()
        tokens += [token for token in piece if token != reader.manifest.eos_token_id]
        start = (start + len(piece)) % reader.num_tokens
    return tokens


@torch.inference_mode()
def score_test(model: MiniMindForCausalLM, cache: KVCache, test: NeedleTest) -> tuple[float, float, float, float]:
    """`exact`, `first`, `rank` and `loss` of one test, as in `Cell`.

    Raises:
        UserError: the model's scores are not finite.
    """
    read_in_pieces(model, cache, test.prompt[:-1])
    length, device = cache.length, cache.keys.device
    found, exact = [], False
    for answer in reversed(test.answers):  # the right one last
        cache.length = length
        logits = model(torch.tensor([[test.prompt[-1], *answer[:-1]]], device=device), cache=cache).logits[0].float()
        targets = torch.tensor(answer, device=device)
        found.append(-float(F.cross_entropy(logits, targets, reduction="sum")))
        exact = bool((logits.argmax(dim=-1) == targets).all())
    if not all(map(math.isfinite, found)):
        raise UserError("the model's scores are NaN or infinite: its weights are damaged or its training diverged")
    right = found.pop()
    rank = 1 + sum(other >= right for other in found)
    return float(exact), float(rank == 1), float(rank), -right / len(test.answers[0])


@torch.inference_mode()
def read_in_pieces(model: MiniMindForCausalLM, cache: KVCache, prompt: Sequence[int]) -> None:
    """Fill an empty or used `cache` with a prompt, a piece at a time: a forward needs the memory of a piece."""
    cache.length = 0
    piece = max(1, min(LONGEST_PIECE, MASK_ELEMENTS // max(1, len(prompt))))
    for start in range(0, len(prompt), piece):
        model.model(torch.tensor([prompt[start : start + piece]], device=cache.keys.device), cache=cache)


def show_cells(cells: Sequence[Cell]) -> str:
    """A table for each figure: a length a row, a depth a column."""
    depths = list(dict.fromkeys(cell.depth for cell in cells))
    titles = {
        "exact": "exact: share of values that greedy decoding gives",
        "first": f"first: share of values that are the likeliest of {CANDIDATES}",
        "loss": "loss: nats a token of the value",
    }
    blocks = []
    for name, title in titles.items():
        rows = [["tokens", *(f"{depth:g}%" for depth in depths), "mean"]]
        for length in dict.fromkeys(cell.length for cell in cells):
            figures = [getattr(cell, name) for cell in cells if cell.length == length]
            rows.append([f"{length:,}", *(f"{figure:.2f}" for figure in [*figures, sum(figures) / len(figures)])])
        blocks.append(f"{title}\n{format_table(rows, '>')}")
    return "\n\n".join(blocks)
