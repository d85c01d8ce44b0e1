"""A conversation as text and as token ids: the Jinja chat template beside a tokenizer, rendered as transformers does.

A text is cut at the template's special tokens and at the borders of what the assistant wrote before it is encoded, so
an answer has the same ids in a history, in training and as it was generated. Text that a message holds never becomes
one of the special tokens; what a tool's call or a thought is written with (`<think>`) is a token in answers alone.
"""

import json
import re
from collections.abc import Callable, Sequence
from functools import cache, cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.meta

from minimind.data.chat_cover import Cover, any_of
from minimind.data.chat_jinja import MARK, chat_environment
from minimind.data.tokenizer import CONFIG_NAME, SPECIAL_TOKENS, Tokenizer
from minimind.errors import UserError

TEMPLATE_NAME = "chat_template.jinja"
_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
_THINKING = ("enable_thinking", "thinking", "open_thinking")
"""Variables that turn thinking on or off: of Qwen3 and our template, of DeepSeek, of MiniMind."""

Turn = dict[str, Any]
"""A message: `role` ("system", "user", "assistant" or "tool") and `content`; of an assistant also `reasoning_content`
and `tool_calls`. `train: False` leaves an assistant's message out of the targets."""


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Turn], tools: Any = None, *, thinking: bool | None = None
) -> list[int]:
    """`ChatTemplate.encode_prompt` of the tokenizer's template."""
    return load_chat_template(tokenizer).encode_prompt(messages, tools, thinking=thinking)


class UntrainableTemplate(UserError):
    """A template that gives answers in which it cannot be told what is to be trained."""


class EncodedConversation(NamedTuple):
    """Token ids, and of each whether it is trained: the assistant's text and the token that closes it."""

    token_ids: list[int]
    targets: list[bool]


class ChatTemplate:
    """A template and the tokenizer that it is written for.

    Raises:
        UserError: its syntax is wrong.
    """

    def __init__(self, text: str, tokenizer: Tokenizer, named_tokens: dict[str, str] | None = None) -> None:
        self.text = text
        self.tokenizer = tokenizer
        self.named_tokens = named_tokens or {}
        try:
            self._template = chat_environment().from_string(text)
            variables = jinja2.meta.find_undeclared_variables(chat_environment().parse(text))
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template of {tokenizer.file} is not valid Jinja: {error}") from None
        self.marks_answers = re.search(r"{%-?\s*generation\s*-?%}", text) is not None
        """Whether the template says itself what the assistant wrote."""
        self.reads_tools = "tools" in variables
        self.thinking_variable = next((name for name in _THINKING if name in variables), None)
        """What turns thinking on or off in a prompt, if anything does."""

    def render(self, messages: Sequence[Turn], tools: Any = None, **options: Any) -> str:
        """The text of a conversation, byte for byte that of transformers' `apply_chat_template`.

        Args:
            tools: JSON schemas of the functions that may be called.
            options: variables of the template, such as `add_generation_prompt`.

        Raises:
            UserError: the template refuses the conversation.
        """
        return self._render(messages, tools, lambda answer: answer, options)

    def encode_prompt(self, messages: Sequence[Turn], tools: Any = None, *, thinking: bool | None = None) -> list[int]:
        """The token ids of a conversation and of the opening of the assistant's next message.

        Args:
            thinking: whether the assistant thinks before it answers; None: as the template has it.

        Raises:
            UserError: the template refuses the conversation, has no place for tools, or cannot turn thinking on or
                off.
        """
        options: dict[str, Any] = {"add_generation_prompt": True}
        if thinking is not None:
            if self.thinking_variable is None:
                raise UserError("the model's chat template cannot turn thinking on or off")
            options[self.thinking_variable] = thinking
        if tools and not self.reads_tools:
            raise UserError("the model's chat template has no place for tools")
        return self._encode(messages, tools, options).token_ids

    @cached_property
    def closing_id(self) -> int | None:
        """The token that closes an answer; None where the template cannot be trained."""
        try:
            token_ids, targets = self.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        except UserError:
            return None
        return [token for token, is_target in zip(token_ids, targets, strict=True) if is_target][-1]

    @cached_property
    def _opening(self) -> str:
        """What a prompt that turns thinking on writes of the answer: `<think>` and a line break."""
        if self.thinking_variable is None or not self.marks_answers:
            return ""
        question = [{"role": "user", "content": "a"}]
        options = ({self.thinking_variable: value, "add_generation_prompt": True} for value in (False, True))
        off, on = (self.render(question, **values) for values in options)
        return on.removeprefix(off) if on.startswith(off) else ""

    @cached_property
    def _keeps_arguments(self) -> bool:
        """Whether arguments of a call that are a text, as the model wrote them, are written as they are."""
        function = {"name": "f", "arguments": '{"x":  1}'}
        called = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
        try:
            return function["arguments"] in self.render([{"role": "user", "content": "a"}, called])
        except UserError:
            return False

    def encode(self, messages: Sequence[Turn], tools: Any = None, *, last_only: bool = False) -> EncodedConversation:
        """The token ids of a whole conversation and which of them are targets.

        Args:
            last_only: train the last of the assistant's messages alone.

        Raises:
            UserError: the template refuses the conversation, leaves the closing token out of what the assistant wrote,
                or writes a message differently once others follow.
        """
        return self._encode(messages, tools, {}, last_only)

    def _render(
        self, messages: Sequence[Turn], tools: Any, mark_answer: Callable[[str], str], options: dict[str, Any]
    ) -> str:
        variables = {"messages": messages, "tools": tools or None, "add_generation_prompt": False}
        variables |= {**self.named_tokens, **options, MARK: mark_answer}
        try:
            return self._template.render(variables)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise UserError(f"the chat template refuses the conversation: {error}") from None

    def _encode(
        self, messages: Sequence[Turn], tools: Any, options: dict[str, Any], last_only: bool = False
    ) -> EncodedConversation:
        if not self._keeps_arguments:
            messages = [_with_parsed_arguments(message) for message in messages]
        cover = Cover(self.tokenizer, json.dumps([messages, tools], ensure_ascii=False, default=str))
        messages, tools = [cover.hide_message(message) for message in messages], cover.hide(tools)
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        trained = {index for index in answers[-1:] if last_only} or set(answers)
        trained = {index for index in trained if messages[index].get("train", True) is not False}
        is_prompt = bool(options)
        if self.marks_answers:
            pieces = cover.split_answers(self._render(messages, tools, cover.mark_answer, options))
        else:
            try:
                pieces = self._find_answers(messages, tools, answers, options)
            except UserError:
                if not is_prompt:
                    raise
                pieces, answers = [self._render(messages, tools, str, options)], []
        if len(pieces) != 2 * len(answers) + 1:
            raise UntrainableTemplate(
                f"the chat template marks {len(pieces) // 2} answers in a conversation of {len(answers)}: its "
                "{% generation %} blocks must hold each of the assistant's messages"
            )
        token_ids: list[int] = []
        targets: list[bool] = []
        for place, piece in enumerate(pieces):
            is_answer = place % 2 == 1
            opening = self._opening if is_answer and piece.startswith(self._opening) else ""
            goes_on = not is_answer and (is_prompt or place < len(pieces) - 1)
            ids = cover.encode(opening, goes_on=True) + cover.encode(piece.removeprefix(opening), goes_on)
            if is_answer and not is_prompt and (not ids or ids[-1] not in self.tokenizer.special_ids.values()):
                raise UntrainableTemplate(
                    "the chat template leaves the token that closes an answer out of its {% generation %} block: a "
                    "model trained with it would never stop"
                )
            token_ids += ids
            targets += [is_answer and answers[place // 2] in trained] * len(ids)
        return EncodedConversation(token_ids, targets)

    def _find_answers(
        self, messages: Sequence[Turn], tools: Any, answers: list[int], options: dict[str, Any]
    ) -> list[str]:
        """The text cut into what is not the assistant's and what is, in turns: found by rendering prefixes."""
        whole = self._render(messages, tools, str, options)
        pieces, done = [], 0
        for index in answers:
            before = self._render(messages[:index], tools, str, {}) if index else ""
            prompt = self._render(messages[:index], tools, str, {"add_generation_prompt": True})
            closed = self._render(messages[: index + 1], tools, str, {})
            start = _shared_length(prompt, whole)  # a template may open an answer in several ways (`<think>`)
            if start <= len(before) or not whole.startswith(closed):
                raise UntrainableTemplate(
                    f"the chat template writes message {index + 1} differently when others follow: an answer would "
                    "not be trained as it is generated; use a template with {% generation %} blocks"
                )
            ends = [match.end() for match in any_of(tuple(self.tokenizer.special_ids)).finditer(closed, start)]
            if not ends:
                raise UntrainableTemplate(
                    "the chat template closes an answer with no special token: a model would never stop"
                )
            pieces += [whole[done:start], whole[start : ends[-1]]]
            done = ends[-1]
        return [*pieces, whole[done:]]


@lru_cache(maxsize=8)
def load_chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    """The template beside a tokenizer: `chat_template.jinja`, or that of `tokenizer_config.json`; without one, ours.

    Raises:
        UserError: a file is damaged, or there is no template and the tokenizer lacks the marks of ours.
    """
    if (found := find_chat_template(tokenizer)) is None:
        missing = [mark for mark in SPECIAL_TOKENS[1:] if mark not in tokenizer.special_ids]
        raise UserError(
            f"tokenizer {tokenizer.file} has no {missing[0]} and no {TEMPLATE_NAME} beside it: it cannot be used for "
            "chat"
        )
    return found


def find_chat_template(tokenizer: Tokenizer) -> ChatTemplate | None:
    """As `load_chat_template`, None where there is no template and ours does not fit."""
    folder = tokenizer.file.parent
    config = read_tokenizer_config(folder)
    named = {name: _content(config[name]) for name in _NAMES if config.get(name)}
    text = config.get("chat_template")
    if isinstance(text, list):  # several by name
        text = {one["name"]: one["template"] for one in text}.get("default")
    try:
        text = (folder / TEMPLATE_NAME).read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {folder / TEMPLATE_NAME}: {error}") from None
    if text is None and set(SPECIAL_TOKENS[1:]) <= set(tokenizer.special_ids):
        text = default_template()
    return None if text is None else ChatTemplate(text, tokenizer, named)


@cache
def default_template() -> str:
    """The template of tokenizers that bring none: ChatML with tools and thinking."""
    return resources.files(__package__).joinpath(TEMPLATE_NAME).read_text(encoding="utf-8")


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """The `tokenizer_config.json` in a folder; empty without one.

    Raises:
        UserError: it is damaged.
    """
    file = folder / CONFIG_NAME
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{file} is damaged: it is not a JSON object")
    return config


def _with_parsed_arguments(message: Turn) -> Turn:
    """A message whose calls have objects as arguments."""
    calls = [{**call, "function": dict(call["function"])} for call in message.get("tool_calls") or []]
    for call in calls:
        if isinstance(arguments := call["function"].get("arguments"), str):
            try:
                call["function"]["arguments"] = json.loads(arguments)
            except (ValueError, RecursionError) as error:
                raise UserError(f"the arguments of a call are no JSON: {error}") from None
    return {**message, "tool_calls": calls} if calls else message


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token


def _shared_length(left: str, right: str) -> int:
    """Characters that both begin with."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
