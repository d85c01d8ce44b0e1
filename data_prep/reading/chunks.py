"""Cuts every input into chunks of about half a megabyte that can be parsed one by one, in any process.

Memory does not grow with the input, nor with a line that is too long. Where a chunk ends depends on the input alone.
Knows nothing of tokens; text formats are only cut here, not parsed.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal, NamedTuple

import data_prep.reading.json_values as json_values
from data_prep.reading.records import CHUNK_BYTES, ReadOptions, Record, Rejected, Text, find_text, reject_long
from data_prep.reading.sources import DATASET, Source, find_non_text, open_source, read_errors, read_head
from data_prep.reading.tables import ParquetTable, read_csv, read_dataset, spool

_UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Chunk:
    """Part of one source. `kind` says how to parse `data`; "records" are texts already found, with their lines."""

    source: str
    kind: Literal["jsonl", "line", "paragraph", "document", "records"]
    first_line: int = 1
    data: bytes = b""
    records: tuple[tuple[int, Text], ...] = ()
    progress: int = 0
    """Bytes of the file on disk that this chunk stands for."""


def cut_source(source: Source, options: ReadOptions) -> Iterator[Chunk]:
    """The chunks of one source, in order. Raises `UserError` for a file that cannot be read to its end."""
    if source.format == DATASET:
        yield from _pack(source, read_dataset(source, options))
        return
    with read_errors(source), open_source(source) as (stream, raw):
        if source.format == "parquet":
            with spool(stream) if source.compression else stream as file:
                yield from _cut_parquet(ParquetTable(file, source, options), source)
            return
        head = read_head(stream)
        if reason := find_non_text(head):
            yield _reject(source, 1, reason, progress=source.size)
            return
        done = 0
        for chunk in _cut_text_format(_Prefixed(head.removeprefix(_UTF8_BOM), stream), source, options):
            yield dataclasses.replace(chunk, progress=raw.tell() - done)
            done = raw.tell()


class _Prefixed:
    """A stream with bytes put back in front of it."""

    def __init__(self, head: bytes, stream: BinaryIO) -> None:
        self._head = head
        self._stream = stream

    def read(self, size: int) -> bytes:
        head, self._head = self._head[:size], self._head[size:]
        return head + self._stream.read(size - len(head)) if len(head) < size else head

    def readline(self, size: int) -> bytes:
        end = self._head.find(b"\n", 0, size) + 1 or min(size, len(self._head))
        line, self._head = self._head[:end], self._head[end:]
        return line if line.endswith(b"\n") or len(line) == size else line + self._stream.readline(size - len(line))


def _cut_text_format(stream: _Prefixed, source: Source, options: ReadOptions) -> Iterator[Chunk]:
    limit = options.max_document_bytes
    if source.format == "json":
        values = json_values.iterate(stream.read, source.name, CHUNK_BYTES, limit)
        texts = (
            (line, find_text(v, options.text_field) if n <= limit else reject_long(limit), n) for line, v, n in values
        )
        yield from _pack(source, texts)
    elif source.format == "csv":
        yield from _pack(source, read_csv(stream, source, options))
    else:
        kind = "jsonl" if source.format == "jsonl" else options.txt_documents
        line = 1
        for data, newlines, blank_lines in _cut_blocks(stream, _SEPARATORS[kind], limit):
            if data is None:
                yield _reject(source, line + blank_lines, reject_long(limit).reason)
            else:
                yield Chunk(source.name, kind, first_line=line, data=data)
            line += newlines


class _Separator(NamedTuple):
    """Where documents may be cut: offsets just behind the last and the first separator in a buffer (0: none); how many
    bytes before the first document belong to none, and how many at the end may begin a separator."""

    last_end: Callable[[bytes], int]
    first_end: Callable[[bytes], int]
    count_leading: Callable[[bytes], int]
    count_begun: Callable[[bytes], int]


_BLANK_LINES = re.compile(rb"\n(?:[ \t\r\f\v]*\n)+")
_LEADING_LINES = re.compile(rb"(?:[ \t\r\f\v]*(?:\n|\Z))*")


def _last_blank_lines_end(buffer: bytes) -> int:
    end = 0
    for match in _BLANK_LINES.finditer(buffer):
        end = match.end()
    return end


def _first_blank_lines_end(buffer: bytes) -> int:
    match = _BLANK_LINES.search(buffer)
    return match.end() if match else 0


def _count_leading_lines(buffer: bytes) -> int:
    match = _LEADING_LINES.match(buffer)
    assert match is not None
    return match.end()


def _count_begun_lines(buffer: bytes) -> int:
    last_line = buffer.rfind(b"\n")
    return len(buffer) - last_line if last_line >= 0 and not buffer[last_line:].strip() else 0


def _none(buffer: bytes) -> int:
    return 0


_LINES = _Separator(lambda b: b.rfind(b"\n") + 1, lambda b: b.find(b"\n") + 1, _none, _none)
_SEPARATORS = {
    "jsonl": _LINES,
    "line": _LINES,
    "paragraph": _Separator(_last_blank_lines_end, _first_blank_lines_end, _count_leading_lines, _count_begun_lines),
    "document": _Separator(_none, _none, _none, _none),
}


def _cut_blocks(stream: _Prefixed, separator: _Separator, limit: int) -> Iterator[tuple[bytes | None, int, int]]:
    """(data, newlines, 0) of blocks of whole documents; (None, newlines, blank lines before it) for a document beyond
    `limit`, which is read over without being held."""
    buffer, is_skipping, newlines, blank_lines = b"", False, 0, 0
    while block := stream.read(CHUNK_BYTES):
        buffer += block
        if is_skipping:
            end = separator.first_end(buffer)
            drop = end or len(buffer) - separator.count_begun(buffer)
            newlines, buffer = newlines + buffer.count(b"\n", 0, drop), buffer[drop:]
            if not end:
                continue
            yield None, newlines, blank_lines
            is_skipping = False
        end = separator.last_end(buffer)
        if end:
            yield buffer[:end], buffer.count(b"\n", 0, end), 0
            buffer = buffer[end:]
        if len(buffer) > limit:
            leading, drop = separator.count_leading(buffer), len(buffer) - separator.count_begun(buffer)
            is_skipping = drop - leading > limit
            if is_skipping:
                blank_lines, newlines = buffer.count(b"\n", 0, leading), buffer.count(b"\n", 0, drop)
                buffer = buffer[drop:]
    if is_skipping:
        yield None, newlines, blank_lines
    elif buffer:
        yield buffer, buffer.count(b"\n"), 0


def _cut_parquet(table: ParquetTable, source: Source) -> Iterator[Chunk]:
    done = 0
    for chunk in _pack(source, table.read_rows()):
        position = chunk.records[-1][0] * source.size // table.num_rows
        yield dataclasses.replace(chunk, progress=position - done)
        done = position


def _pack(source: Source, records: Iterable[Record]) -> Iterator[Chunk]:
    """Records in chunks of about `CHUNK_BYTES`."""
    packed: list[tuple[int, Text]] = []
    total = 0
    for line, text, size in records:
        packed.append((line, text))
        total += size + 64
        if total >= CHUNK_BYTES:
            yield Chunk(source.name, "records", records=tuple(packed))
            packed, total = [], 0
    if packed:
        yield Chunk(source.name, "records", records=tuple(packed))


def _reject(source: Source, line: int, reason: str, progress: int = 0) -> Chunk:
    return Chunk(source.name, "records", records=((line, Rejected(reason)),), progress=progress)
