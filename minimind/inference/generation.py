"""Continue texts with a trained model: `complete` for a batch, `stream_text` for one text as it grows."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from minimind.data.chat_template import find_chat_template
from minimind.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from minimind.errors import UserError
from minimind.inference.decoding import Decoding, Row, decode
from minimind.inference.sampling import GenerationOptions
from minimind.inference.text_stream import TextStream
from minimind.model import MiniMindForCausalLM

Prompt = str | Sequence[int]
"""A text (an empty one is the beginning of a document), or token ids."""


@dataclass(frozen=True)
class Completion:
    """One finished continuation. `reason`: "stop" (a stop token or text) or "length" (max_new_tokens)."""

    text: str
    token_ids: tuple[int, ...]
    reason: str | None


class Continuation(Row):
    """A row with its text, which stop texts end too."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: Prompt, options: GenerationOptions, num_logprobs: int | None = None
    ) -> None:
        ids = encode_prompt(tokenizer, prompt)
        ends = end_tokens(tokenizer) if options.stop_token_ids is None else options.stop_token_ids
        super().__init__(ids, options, ends, num_logprobs)
        self.piece = ""
        """The text that the newest token has made certain."""
        self._stream = TextStream(tokenizer, ids, options.stop)

    def take(self, token: int) -> None:
        """As in `Row`; sets `piece`."""
        super().take(token)
        self.piece = "" if self.reason == "stop" else self._stream.push(token)
        if self.reason is not None:
            self.piece += self._stream.finish()
        if self._stream.is_stopped:
            self.reason = "stop"

    def completion(self) -> Completion:
        """What there is by now."""
        return Completion(self._stream.text, tuple(self.new_tokens), self.reason)


R = TypeVar("R", bound=Row)


def complete(
    model: MiniMindForCausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    options: GenerationOptions | None = None,
) -> list[Completion]:
    """Continue prompts in one batch; each gets the same completion as alone, row i with seed + i.

    Raises:
        UserError: a prompt cannot be continued.
    """
    options = options or GenerationOptions()
    seeds = [None if options.seed is None else options.seed + row for row in range(len(prompts))]
    rows = [
        Continuation(tokenizer, prompt, dataclasses.replace(options, seed=seed))
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    for _ in decode(model, rows, tokenizer.vocab_size):
        pass
    return [row.completion() for row in rows]


def complete_in_turn(
    model: MiniMindForCausalLM, vocab_size: int, rows: Iterable[R], max_batch_size: int
) -> Iterator[R]:
    """Continue rows, so many at a time: where one has ended, the next joins. Yields each when it has ended.

    The model must be in evaluation mode.

    Raises:
        UserError: a row cannot be continued.
    """
    decoding = Decoding(model, vocab_size)
    left, running = iter(rows), list[R]()
    while True:
        joining = list(itertools.islice(left, max_batch_size - len(running)))
        running += joining
        if not running:
            return
        decoding.join(joining)
        decoding.step()
        yield from (row for row in running if row.reason is not None)
        running = [row for row in running if row.reason is None]


def stream_text(
    model: MiniMindForCausalLM, tokenizer: Tokenizer, prompt: Prompt, options: GenerationOptions | None = None
) -> Iterator[str]:
    """Continue one prompt; yields text as soon as it is certain, complete characters only."""
    row = Continuation(tokenizer, prompt, options or GenerationOptions())
    for _ in decode(model, [row], tokenizer.vocab_size):
        if row.piece:
            yield row.piece


@functools.lru_cache(maxsize=8)
def end_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a document and, if the tokenizer has it, a turn: its own and its chat template's."""
    end_of_turn = tokenizer.special_ids.get(SPECIAL_TOKENS[2])
    template = None
    with contextlib.suppress(UserError):  # a damaged template is an error where it is used
        template = find_chat_template(tokenizer)
    found = (tokenizer.eos_token_id, end_of_turn, template.closing_id if template else None)
    return tuple(dict.fromkeys(token for token in found if token is not None))


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Its token ids."""
    return tokenizer.encode(prompt) or [tokenizer.eos_token_id] if isinstance(prompt, str) else list(prompt)
