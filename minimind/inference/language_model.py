"""Text in, text out: a model with its tokenizer, and what Python does with it. The commands have their own flags."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, overload

from minimind.data.tokenizer import Tokenizer
from minimind.errors import UserError
from minimind.inference.chat import encode_question
from minimind.inference.generation import Prompt, complete, stream_text
from minimind.inference.likelihood import encode_pair, log_likelihood
from minimind.inference.sampling import GenerationOptions
from minimind.model import MiniMindForCausalLM

Texts = list[str] | tuple[str, ...]  # not Sequence[str], which a single string is too


@dataclass(frozen=True)
class LanguageModel:
    """A trained model with the tokenizer that belongs to it."""

    model: MiniMindForCausalLM
    tokenizer: Tokenizer

    def __repr__(self) -> str:
        weight = self.model.lm_head.weight
        count = self.model.config.num_params()
        return f"LanguageModel({count:,} parameters, {weight.dtype}, {weight.device}, {self.tokenizer.file})"


@dataclass(frozen=True)
class Score:
    """How likely a model finds a text."""

    log_likelihood: float
    """Of the whole text, in nats."""
    num_tokens: int
    num_bytes: int
    """UTF-8 bytes of the text."""

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of a token, in nats."""
        return -self.log_likelihood / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Independent of the tokenizer, so it compares models of all kinds."""
        return -self.log_likelihood / math.log(2) / self.num_bytes


@overload
def generate(model: LanguageModel, prompts: str, *, chat: bool = ..., system: str = ..., **options: Any) -> str: ...
@overload
def generate(
    model: LanguageModel, prompts: Texts, *, chat: bool = ..., system: str = ..., **options: Any
) -> list[str]: ...
def generate(
    model: LanguageModel, prompts: str | Texts, *, chat: bool = False, system: str = "", **options: Any
) -> str | list[str]:
    """Continue one text, or several in one batch; the prompts themselves are not part of the result.

    Args:
        chat: each prompt is a question, put into the chat format.
        system: the system message of the chat.
        options: fields of `GenerationOptions`, with its defaults: `max_new_tokens`, `temperature`, `top_k`, `top_p`,
            `min_p`, `repetition_penalty`, `seed`, `stop`, `stop_token_ids`.

    Raises:
        UserError: an option is out of range, or a prompt is too long for the model.
    """
    texts = [prompts] if isinstance(prompts, str) else prompts
    rows = [_encode(model, text, chat, system) for text in texts]
    found = [answer.text for answer in complete(model.model, model.tokenizer, rows, _read_options(options))]
    return found[0] if isinstance(prompts, str) else found


def stream(model: LanguageModel, prompt: str, *, chat: bool = False, system: str = "", **options: Any) -> Iterator[str]:
    """Continue one text; yields pieces as they come. Arguments and errors are those of `generate`."""
    row = _encode(model, prompt, chat, system)
    return stream_text(model.model, model.tokenizer, row, _read_options(options))


@overload
def score(model: LanguageModel, texts: str, *, context: str = ...) -> Score: ...
@overload
def score(model: LanguageModel, texts: Texts, *, context: str = ...) -> list[Score]: ...
def score(model: LanguageModel, texts: str | Texts, *, context: str = "") -> Score | list[Score]:
    """Log-likelihood of one text or of several, each after `context` (empty: at the start of a document).

    Raises:
        UserError: a text is empty, or longer than the model can read (`python -m minimind.evaluate` cuts long texts).
    """
    if isinstance(texts, str):
        return _score(model, texts, context)
    return [_score(model, text, context) for text in texts]


def _score(model: LanguageModel, text: str, context: str) -> Score:
    before, tokens = encode_pair(model.tokenizer, context, text)
    positions = model.model.config.max_position_embeddings
    if not tokens:
        raise UserError("an empty text has no likelihood")
    if len(before) + len(tokens) - 1 > positions:
        raise UserError(
            f"a text of {len(tokens)} tokens after {len(before)} is beyond the model's {positions} positions: cut it, "
            "or use python -m minimind.evaluate"
        )
    was_training = model.model.training
    model.model.eval()
    try:
        return Score(log_likelihood(model.model, before, tokens), len(tokens), len(text.encode()))
    finally:
        model.model.train(was_training)


def _encode(model: LanguageModel, prompt: str, chat: bool, system: str) -> Prompt:
    if system and not chat:
        raise UserError("system has no effect on plain prompts: add chat=True")
    return encode_question(model.tokenizer, prompt, system) if chat else prompt


def _read_options(given: dict[str, Any]) -> GenerationOptions:
    tuples = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    if isinstance(stop := given.get("stop"), str):
        tuples["stop"] = (stop,)  # a tuple of the string's characters would stop at each of them
    return GenerationOptions(**{**given, **tuples})
