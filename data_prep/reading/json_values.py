"""The values in a `.json` file one after another, in constant memory: the elements of one array, or values in a row.

The standard parser does the parsing; this finds where each value ends. Knows nothing of documents.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from minimind.errors import UserError

_BLANKS = re.compile(r"[ \t\r\n]*")
_BLANKS_AND_COMMAS = re.compile(r"[ \t\r\n,]*")


def iterate(
    read: Callable[[int], bytes], name: str, block_bytes: int, max_characters: int
) -> Iterator[tuple[int, Any, int]]:
    """(line, value, characters) of each value that `read` gives the bytes of; invalid UTF-8 becomes lone surrogates.

    Raises `UserError` with the line at the first error: there is no telling where the next value begins.
    """
    text = _Text(read, block_bytes)
    scan = json.JSONDecoder().raw_decode
    in_array, begun = False, False
    while text.skip(_BLANKS_AND_COMMAS if in_array else _BLANKS):
        first = text.text[text.position]
        if (first == "[" and not begun) or (first == "]" and in_array):
            in_array, begun = first == "[", True
            text.advance(text.position + 1)
            continue
        begun = True
        problem = "broken JSON"
        try:
            value, end = scan(text.text, text.position)
            # A number that touches the end of what is read may go on.
            complete = end < len(text.text) or text.ended
        except (ValueError, RecursionError) as error:
            complete = False
            problem += f": {error.msg}" if isinstance(error, json.JSONDecodeError) else f": {error}"
        if complete:
            yield text.line, value, end - text.position
            text.advance(end)
        elif text.ended:
            raise UserError(f"{name}:{text.line}: {problem}; what follows cannot be read: mend it or write .jsonl")
        elif len(text.text) - text.position > max_characters:
            raise UserError(
                f"{name}:{text.line}: {problem}, or a value above --max-document-bytes {max_characters:,}; "
                "what follows cannot be read: mend it or write .jsonl"
            )
        else:
            text.refill()
    if in_array:
        raise UserError(f"{name}:{text.line}: broken JSON: the array has no end; the file was cut short")


class _Text:
    """A window on decoded text with a position and its line number."""

    def __init__(self, read: Callable[[int], bytes], block_bytes: int) -> None:
        self._read = read
        self._block_bytes = block_bytes
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self.text = ""
        self.position = 0
        self.line = 1
        self.ended = False

    def advance(self, position: int) -> None:
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def skip(self, gap: re.Pattern[str]) -> bool:
        """Go to the next character that `gap` does not match; False at the end."""
        while True:
            match = gap.match(self.text, self.position)
            assert match is not None
            self.advance(match.end())
            if self.position < len(self.text):
                return True
            if self.ended:
                return False
            self.refill()

    def refill(self) -> None:
        """Read as much again as is waiting, so that a long value is scanned a few times only."""
        waiting = self.text[self.position :]
        block = self._read(max(self._block_bytes, len(waiting)))
        self.ended = not block
        self.text, self.position = waiting + self._decode(block, final=self.ended), 0
