"""Documents out of chunks, and what becomes of those that are bad: one line each, counted, skipped, or the end.

The one reader of all commands that take text. Knows nothing of tokens, splits or files on disk other than its log.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from tqdm import tqdm

from data_prep.reading.chunks import Chunk, cut_source
from data_prep.reading.records import ReadOptions, Rejected, Text, find_text, reject_long
from data_prep.reading.sources import Source
from minimind.errors import UserError

_SHOWN = 20
_EARLY_DOCUMENTS = 10_000


class Problem(NamedTuple):
    """One bad document."""

    source: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.reason}"


def parse_chunk(chunk: Chunk, options: ReadOptions) -> tuple[list[str], list[Problem]]:
    """The good documents of a chunk in order, and its bad ones."""
    texts: list[str] = []
    problems: list[Problem] = []
    for line, raw in _find_texts(chunk, options):
        text = _check(raw, options.max_document_bytes)
        if isinstance(text, Rejected):
            problems.append(Problem(chunk.source, line, text.reason))
        else:
            texts.append(text)
    return texts, problems


class BadDocuments:
    """Counts bad documents, shows the first ones on standard error, writes all to `log`, and stops a run with too many.

    Whether and where it stops depends on the documents alone, as long as they come in order.
    """

    def __init__(self, max_fraction: float, log: IO[str] | None = None) -> None:
        self.count = 0
        self._max_fraction = max_fraction
        self._log = log
        self._documents = 0
        self._first: Problem | None = None

    def add(self, num_documents: int, problems: Iterable[Problem]) -> None:
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
            texts, problems = parse_chunk(chunk, options)
            bad.add(len(texts) + len(problems), problems)
            yield from texts
    bad.finish()


def _find_texts(chunk: Chunk, options: ReadOptions) -> Iterator[tuple[int, Text]]:
    if chunk.kind == "records":
        yield from chunk.records
        return
    if chunk.kind == "document":
        documents: Iterable[tuple[int, bytes]] = [(1, chunk.data)]
    elif chunk.kind == "paragraph":
        documents = _find_paragraphs(chunk)
    else:
        documents = enumerate(chunk.data.split(b"\n"), start=chunk.first_line)
    for line, data in documents:
        # The very bytes that the reader counts, so that no document depends on where a chunk ends.
        if len(data) > options.max_document_bytes:
            yield line, reject_long(options.max_document_bytes)
        elif chunk.kind == "document":
            yield line, data
        elif data and not data.isspace():
            yield (
                line,
                _parse_json_line(data, options.text_field) if chunk.kind == "jsonl" else data.removesuffix(b"\r"),
            )


def _find_paragraphs(chunk: Chunk) -> Iterator[tuple[int, bytes]]:
    """Runs of lines that are not blank."""
    first, paragraph = 0, []
    for line, data in enumerate([*chunk.data.split(b"\n"), b""], start=chunk.first_line):
        if data and not data.isspace():
            first = first or line
            paragraph.append(data)
        elif first:
            yield first, b"\n".join(paragraph)
            first, paragraph = 0, []


def _parse_json_line(data: bytes, field: str) -> Text:
    text = _decode(data)
    if isinstance(text, Rejected):
        return text
    try:
        return find_text(json.loads(text), field)
    except json.JSONDecodeError as error:
        return Rejected(f"broken JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets within brackets
        return Rejected(f"broken JSON: {error}")


def _decode(data: bytes) -> str | Rejected:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        return Rejected(f"invalid UTF-8: byte 0x{data[error.start]:02x} at column {error.start + 1}")


def _check(raw: Text, limit: int) -> str | Rejected:
    text = _decode(raw) if isinstance(raw, bytes) else raw
    if isinstance(text, Rejected):
        return text
    if not text or text.isspace():
        return Rejected("empty document")
    if "\0" in text:
        return Rejected(f"NUL character at position {text.index(chr(0)) + 1}")
    try:
        size = len(text) if text.isascii() else len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        return Rejected(f"invalid Unicode: lone surrogate at position {error.start + 1}")
    return text if size <= limit else reject_long(limit)


def open_log(path: Path) -> IO[str]:
    """A log for `BadDocuments`, begun anew."""
    return open(path, "w", encoding="utf-8", errors="backslashreplace", newline="\n")
