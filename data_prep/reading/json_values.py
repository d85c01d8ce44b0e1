"""The values in a `.json` file one after another, in constant memory: the elements of one array, or values in a row.

The standard parser does the parsing; this finds where each value ends. (arrow reads no arrays, and `json.load` holds
the whole file.)
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from minimind.errors import UserError

_GAP = re.compile(r"[ \t\r\n]*")
_GAP_IN_ARRAY = re.compile(r"[ \t\r\n,]*")


def iterate(
    read: Callable[[int], bytes], name: str, block_bytes: int, max_characters: int
) -> Iterator[tuple[int, Any, int]]:
    """(line, value, characters) of each value that `read` gives the bytes of; invalid UTF-8 becomes lone surrogates.

    Raises `UserError` with the line at the first error: there is no telling where the next value begins.
    """
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    scan = json.JSONDecoder().raw_decode
    text, position, line, ended, in_array, begun = "", 0, 1, False, False, False
    while True:
        match = (_GAP_IN_ARRAY if in_array else _GAP).match(text, position)
        assert match is not None
        line += text.count("\n", position, match.end())
        position = match.end()
        problem = "broken JSON"
        if position < len(text):
            first = text[position]
            if (first == "[" and not begun) or (first == "]" and in_array):
                in_array, begun, position = first == "[", True, position + 1
                continue
            begun = True
            try:
                value, end = scan(text, position)
                # A number that touches the end of what is read may go on.
                if end < len(text) or ended:
                    yield line, value, end - position
                    line += text.count("\n", position, end)
                    position = end
                    continue
            except (ValueError, RecursionError) as error:
                problem += f": {error.msg if isinstance(error, json.JSONDecodeError) else error}"
            if len(text) - position > max_characters:
                problem += f", or a value above --max-document-bytes {max_characters:,}"
            if ended or len(text) - position > max_characters:
                raise UserError(f"{name}:{line}: {problem}; what follows cannot be read: mend it or write .jsonl")
        elif ended:
            break
        # As much again as is waiting, so that a long value is scanned a few times only.
        text, position = text[position:], 0
        block = read(max(block_bytes, len(text)))
        ended = not block
        text += decode(block, final=ended)
    if in_array:
        raise UserError(f"{name}:{line}: broken JSON: the array has no end; the file was cut short")
