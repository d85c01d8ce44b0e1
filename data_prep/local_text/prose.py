"""Text cut into sections, small pieces packed together, and what does not read like text told apart.

Rules of thumb for documentation (Markdown, reStructuredText, docstrings). Knows nothing of where texts come from.
"""

import re
from collections.abc import Iterable, Iterator

_SECTION_CHARACTERS = 1000
_LONGEST_SECTION = 20_000
_SMALLEST_DOCUMENT = 120
_SMALLEST_LETTERS = 0.7

# A Markdown heading, or a line that the next one underlines (reStructuredText, Markdown).
_HEADING = re.compile(r"^(?=#{1,6} \S)|^(?=[^\s].*\n(?:={3,}|-{3,}|~{3,}|\^{3,}|\*{3,})[ \t]*$)", re.MULTILINE)
# Badges, pictures, raw HTML, link targets: lines that are no text.
_NO_TEXT = re.compile(
    r"^[ \t]*(?:\[?!\[|<|\.\. (?:image|figure|_|\|)|:target:|:alt:|\[[^\]]+\]:[ \t]|\|.*\|[ \t]*$).*\n?", re.M
)
_BLANK_LINES = re.compile(r"\n{3,}")
# NUL and lone surrogates, from escapes in source text.
_ODD = re.compile("[\0\ud800-\udfff]")
_NO_LETTER = re.compile(r"[^\w\s]|[\d_]")


def split_sections(text: str) -> Iterator[str]:
    """Sections of a document, each beginning with its heading; short ones stay together."""
    text = _BLANK_LINES.sub("\n\n", _NO_TEXT.sub("", text))
    yield from pack_pieces(_HEADING.split(text))


def pack_pieces(pieces: Iterable[str]) -> Iterator[str]:
    """Pieces joined in order to documents of about a thousand characters; a very long one is cut at a blank line."""
    packed: list[str] = []
    size = 0
    for piece in pieces:
        for part in _cut(piece.strip("\n").rstrip()):
            packed.append(part)
            size += len(part)
            if size >= _SECTION_CHARACTERS:
                yield "\n\n".join(packed)
                packed, size = [], 0
    if packed:
        yield "\n\n".join(packed)


def is_prose(text: str) -> bool:
    """Whether a text is long enough and mostly letters: no table of numbers, no encoded data, no odd characters."""
    if (
        _ODD.search(text)
        or len(text) < _SMALLEST_DOCUMENT
        or any(len(word) > 200 for word in text.split() if word.isascii())
    ):
        return False
    blanks = sum(map(str.isspace, text))
    others = len(_NO_LETTER.findall(text))
    return 1 - others / max(len(text) - blanks, 1) >= _SMALLEST_LETTERS


def _cut(piece: str) -> Iterator[str]:
    while len(piece) > _LONGEST_SECTION:
        end = piece.rfind("\n\n", 0, _LONGEST_SECTION)
        end = end if end > 0 else _LONGEST_SECTION
        yield piece[:end]
        piece = piece[end:].strip("\n")
    if piece:
        yield piece
