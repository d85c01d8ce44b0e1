"""What a message holds and must not become a token of the template, hidden while a chat template is rendered."""

import re
from functools import cache
from itertools import count
from typing import Any

from minimind.data.tokenizer import Tokenizer


class Cover:
    """Stands in for tokens of the template that a message's text holds while a template is rendered."""

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        self._tokenizer = tokenizer
        self._ids = tokenizer.special_ids | tokenizer.mark_ids
        self._tokens = any_of(tuple(self._ids))
        self._specials = any_of(tuple(tokenizer.special_ids))
        key = next(key for key in (f"\ue000{number}:" for number in count()) if key not in text)
        self._border = f"{key}\ue001"
        self._hidden = {token: f"{key}{place}\ue001" for place, token in enumerate(self._ids)}
        self._shown = {hidden: token for token, hidden in self._hidden.items()}
        self._covers = re.compile(f"{key}[0-9]+\ue001")

    def hide_message(self, message: dict[str, Any]) -> dict[str, Any]:
        """An answer free of special tokens; a message of anybody else free of the marks of answers too."""
        return self.hide(message, self._specials if message["role"] == "assistant" else self._tokens)

    def hide(self, value: Any, hidden: re.Pattern[str] | None = None) -> Any:
        """`value` with every string in it free of these tokens (all of them without `hidden`)."""
        if isinstance(value, str):
            return (hidden or self._tokens).sub(lambda match: self._hidden[match[0]], value)
        if isinstance(value, dict):
            return {key: self.hide(inner, hidden) for key, inner in value.items()}
        return [self.hide(inner, hidden) for inner in value] if isinstance(value, list | tuple) else value

    def mark_answer(self, answer: str) -> str:
        return self._border + answer + self._border

    def split_answers(self, text: str) -> list[str]:
        return text.split(self._border)

    def encode(self, piece: str, goes_on: bool = False) -> list[int]:
        """Ids of a piece of rendered text: the template's tokens are single ids, hidden ones are text.

        Args:
            goes_on: an answer follows. Its first letter may decide how the white space before it is cut.
        """
        token_ids: list[int] = []
        done = 0
        for match in [*self._tokens.finditer(piece), None]:
            text = piece[done : match.start() if match else len(piece)]
            shown = self._covers.sub(lambda cover: self._shown[cover[0]], text)
            token_ids += self._encode_text(shown, goes_on and match is None)
            if match:
                token_ids.append(self._ids[match[0]])
                done = match.end()
        return token_ids

    def _encode_text(self, text: str, goes_on: bool) -> list[int]:
        if goes_on and text:
            ids, letter = (self._tokenizer.encode(shown, allow_special=False) for shown in (text + "x", "x"))
            before = ids[: -len(letter)]
            if before + letter == ids and self._tokenizer.decode(before) == text:
                return before
        return self._tokenizer.encode(text, allow_special=False) if text else []


@cache
def any_of(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
