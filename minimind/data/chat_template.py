"""A conversation as token ids, in MiniMind's chat format."""

from collections.abc import Iterable
from dataclasses import dataclass

from minimind.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from minimind.errors import UserError

_START, _END = SPECIAL_TOKENS[1:]


@dataclass(frozen=True)
class Message:
    """One turn: `role` is "system", "user" or "assistant"."""

    role: str
    content: str


def encode_chat(tokenizer: Tokenizer, messages: Iterable[Message]) -> list[int]:
    """The token ids of a conversation and of the opening of the assistant's next turn.

    Raises:
        UserError: the tokenizer lacks the marks of a turn.
    """
    missing = [mark for mark in (_START, _END) if mark not in tokenizer.special_ids]
    if missing:
        raise UserError(f"tokenizer {tokenizer.file} has no {missing[0]}: it cannot be used for chat")
    start, end = tokenizer.special_ids[_START], tokenizer.special_ids[_END]
    line_break = tokenizer.encode("\n", allow_special=False)
    token_ids: list[int] = []
    for message in messages:
        turn = tokenizer.encode(f"{message.role}\n{message.content}", allow_special=False)
        token_ids += [start, *turn, end, *line_break]
    return [*token_ids, start, *tokenizer.encode("assistant\n", allow_special=False)]
