"""Documents of chunks, and what becomes of bad ones: a line each, counted, left out, or the end of the run.

The one reader of all commands that take text.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from typing import IO, NamedTuple

from tqdm import tqdm

from data_prep.reading.byte_stream import Source
from data_prep.reading.chunks import Chunk, cut_source
from data_prep.reading.records import ReadOptions, Rejected, Text, reject_long
from minimind.errors import UserError

_SHOWN = 20
_EARLY_DOCUMENTS = 10_000


class Parsed(NamedTuple):
    """What a chunk holds: good documents and where each begins, a line on each bad one, and how many were empty."""

    texts: list[str]
    lines: list[int]
    problems: list[str]
    num_empty: int


def parse_chunk(chunk: Chunk, options: ReadOptions) -> Parsed:
    texts, lines, problems = [], [], []
    for line, raw in chunk.records:
        text = _check(raw, chunk.source.format == "jsonl", options)
        if isinstance(text, Rejected):
            problems.append(f"{chunk.source.name}:{line}: {text}")
        elif text and not text.isspace():
            texts.append(text)
            lines.append(line)
    return Parsed(texts, lines, problems, len(chunk.records) - len(texts) - len(problems))


def _check(raw: Text, is_json: bool, options: ReadOptions) -> str | Rejected:
    text = _decode(raw, is_json, options) if isinstance(raw, bytes) else raw
    if isinstance(text, Rejected):
        return text
    if "\0" in text:
        return Rejected(f"NUL character at position {text.index(chr(0)) + 1}")
    try:
        size = len(text) if text.isascii() else len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        return Rejected(f"invalid Unicode: lone surrogate at position {error.start + 1}")
    return text if size <= options.max_document_bytes else reject_long(options.max_document_bytes)


def _decode(data: bytes, is_json: bool, options: ReadOptions) -> str | Rejected:
    try:
        text = data.decode("utf-8")
        return options.find_text(json.loads(text)) if is_json else text
    except UnicodeDecodeError as error:
        is_utf8 = options.encoding == "utf-8"
        reason = f"invalid UTF-8: byte 0x{data[error.start]:02x}" if is_utf8 else f"not valid {options.encoding}"
        return Rejected(f"{reason} at column {error.start + 1}")
    except json.JSONDecodeError as error:
        return Rejected(f"broken JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets within brackets
        return Rejected(f"broken JSON: {error}")


class BadDocuments:
    """Counts bad documents, shows the first ones on standard error, writes all to `log`, and stops a run with too many.

    Whether and where it stops depends on the documents alone, as long as they come in order.
    """

    def __init__(self, max_fraction: float, log: IO[str] | None = None) -> None:
        self.count = 0
        self._max_fraction = max_fraction
        self._log = log
        self._documents = 0
        self._first = ""

    def add(self, num_documents: int, problems: Iterable[str]) -> None:
        """Take account of `num_documents` documents, of which `problems` are bad.

        Raises `UserError` as soon as the end cannot make good the fraction of the first ten thousand.
        """
        self._documents += num_documents
        for problem in problems:
            self._first = self._first or problem
            self.count += 1
            if self._log:
                self._log.write(f"{problem}\n")
            if self.count <= _SHOWN:
                tqdm.write(f"skipped: {problem}", file=sys.stderr)
            elif self.count == _SHOWN + 1:
                tqdm.write("skipped: further ones are not shown", file=sys.stderr)
        self._check(max(self._documents, _EARLY_DOCUMENTS))

    def finish(self) -> None:
        """Raise `UserError` if too many of all documents were bad."""
        self._check(self._documents)

    def _check(self, documents: int) -> None:
        if self.count > self._max_fraction * documents:
            raise UserError(
                f"{self.count:,} of {self._documents:,} documents are bad, above --max-bad-fraction "
                f"{self._max_fraction:g}; the first is {self._first}: mend them or raise the fraction"
            )


def read_documents(sources: Iterable[Source], options: ReadOptions, bad: BadDocuments) -> Iterator[str]:
    """All good documents of all sources, in order."""
    for source in sources:
        for chunk in cut_source(source, options):
            parsed = parse_chunk(chunk, options)
            bad.add(len(parsed.texts) + len(parsed.problems), parsed.problems)
            yield from parsed.texts
    bad.finish()
