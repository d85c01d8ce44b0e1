"""Continue prompts with a trained model: `complete` for a batch, `stream_text` for one text as it grows."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from minimind.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from minimind.inference.decoding import Decoding
from minimind.inference.sampling import SamplingOptions
from minimind.inference.text_stream import TextStream
from minimind.model import MiniMindForCausalLM
from minimind.schema import AT_LEAST_1

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class GenerationOptions(SamplingOptions):
    """How a continuation is sampled, and where it ends."""

    max_new_tokens: Annotated[int, AT_LEAST_1] = 256
    """Limit of a continuation, in tokens."""
    stop: tuple[str, ...] = ()
    """A continuation ends before any of these texts."""
    stop_token_ids: tuple[int, ...] | None = None
    """A continuation ends before any of these ids; None: end of document and end of turn."""


@dataclass(frozen=True)
class Completion:
    """One finished continuation. `reason`: "stop" (a stop token or text) or "length" (max_new_tokens)."""

    text: str
    token_ids: tuple[int, ...]
    reason: Literal["stop", "length"]


def complete(
    model: MiniMindForCausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    options: GenerationOptions | None = None,
) -> list[Completion]:
    """Continue prompts (texts or token ids) in one batch; each gets the same completion as alone.

    An empty text is the beginning of a document. Raises `UserError` for an invalid prompt.
    """
    batch = _Batch(model, tokenizer, prompts, options or GenerationOptions())
    for _ in batch.pieces():
        pass
    return batch.completions()


def stream_text(
    model: MiniMindForCausalLM, tokenizer: Tokenizer, prompt: Prompt, options: GenerationOptions | None = None
) -> Iterator[str]:
    """Continue one prompt; yields text as soon as it is certain, complete characters only."""
    for _, piece in _Batch(model, tokenizer, [prompt], options or GenerationOptions()).pieces():
        yield piece


class _Batch:
    """Prompts in progress: decoding, and one text stream a row."""

    def __init__(
        self, model: MiniMindForCausalLM, tokenizer: Tokenizer, prompts: Sequence[Prompt], options: GenerationOptions
    ) -> None:
        rows = [_encode_prompt(tokenizer, prompt) for prompt in prompts]
        stop_token_ids = options.stop_token_ids
        if stop_token_ids is None:
            stop_token_ids = end_tokens(tokenizer)
        seeds = [None if options.seed is None else options.seed + row for row in range(len(rows))]
        self._model = model
        self._decoding = Decoding(
            model,
            rows,
            [dataclasses.replace(options, seed=seed) for seed in seeds],
            max_new_tokens=options.max_new_tokens,
            stop_token_ids=stop_token_ids,
            vocab_size=tokenizer.vocab_size,
        )
        self._streams = [TextStream(tokenizer, row, options.stop) for row in rows]
        self._token_ids: list[list[int]] = [[] for _ in rows]
        self._max_new_tokens = options.max_new_tokens

    def pieces(self) -> Iterator[tuple[int, str]]:
        """(row, text) until every row has ended."""
        was_training = self._model.training
        self._model.eval()
        try:
            while not self._decoding.is_done:
                for row, token in enumerate(self._decoding.step()):
                    if token is None:
                        continue
                    self._token_ids[row].append(token)
                    if piece := self._streams[row].push(token):
                        yield row, piece
                    if self._streams[row].is_stopped:
                        self._decoding.end(row)
            for row, text in enumerate(self._streams):
                if piece := text.finish():
                    yield row, piece
        finally:
            self._model.train(was_training)

    def completions(self) -> list[Completion]:
        return [
            Completion(
                text.text,
                tuple(token_ids),
                "length" if len(token_ids) == self._max_new_tokens and not text.is_stopped else "stop",
            )
            for text, token_ids in zip(self._streams, self._token_ids, strict=True)
        ]


def end_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a document and, if the tokenizer has it, a turn."""
    end_of_turn = tokenizer.special_ids.get(SPECIAL_TOKENS[2], tokenizer.eos_token_id)
    return tuple(dict.fromkeys((tokenizer.eos_token_id, end_of_turn)))


def _encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer.encode(prompt) or [tokenizer.eos_token_id]
    return list(prompt)
