"""Cuts every input into chunks of about half a megabyte that can be parsed one by one, in any process.

Memory does not grow with the input, nor with a line that is too long. Where a chunk ends depends on the input alone.
Knows nothing of tokens; text formats are only cut here, not parsed.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal, NamedTuple

import data_prep.json_values as json_values
from data_prep.records import CHUNK_BYTES, ReadOptions, Record, Rejected, Text, describe_length, find_text
from data_prep.sources import DATASET, Source, find_non_text, open_source, read_errors, read_head
from data_prep.tables import ParquetTable, read_csv, read_dataset, spool

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
        yield from _pack(source, ((line, find_text(value, options.text_field), size) for line, value, size in values))
    elif source.format == "csv":
        yield from _pack(source, read_csv(stream, source, options))
    else:
        kind = "jsonl" if source.format == "jsonl" else options.txt_documents
        line = 1
        for data, size, newlines in _cut_blocks(stream, _SEPARATORS[kind], limit):
            if data is None:
                yield _reject(source, line, describe_length(size, limit))
            else:
                yield Chunk(source.name, kind, first_line=line, data=data)
            line += newlines


class _Separator(NamedTuple):
    """Where documents may be cut: offsets just behind the last and the first separator in a buffer (0: none), and the
    end of a buffer that may be the beginning of a separator."""

    last_end: Callable[[bytes], int]
    first_end: Callable[[bytes], int]
    begun: Callable[[bytes], bytes]


_BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")


def _last_blank_lines_end(buffer: bytes) -> int:
    end = 0
    for match in _BLANK_LINES.finditer(buffer):
        end = match.end()
    return end


def _first_blank_lines_end(buffer: bytes) -> int:
    match = _BLANK_LINES.search(buffer)
    return match.end() if match else 0


def _begun_blank_lines(buffer: bytes) -> bytes:
    last_line = buffer.rfind(b"\n")
    return buffer[last_line:] if last_line >= 0 and not buffer[last_line:].strip() else b""


_LINES = _Separator(lambda b: b.rfind(b"\n") + 1, lambda b: b.find(b"\n") + 1, lambda b: b"")
_SEPARATORS = {
    "jsonl": _LINES,
    "line": _LINES,
    "paragraph": _Separator(_last_blank_lines_end, _first_blank_lines_end, _begun_blank_lines),
    "document": _Separator(lambda b: 0, lambda b: 0, lambda b: b""),
}


def _cut_blocks(stream: _Prefixed, separator: _Separator, limit: int) -> Iterator[tuple[bytes | None, int, int]]:
    """(data, bytes, newlines) of blocks of whole documents; data is None for a document beyond `limit`, which is read
    over without being held."""
    buffer, skipped, newlines = b"", 0, 0
    while block := stream.read(CHUNK_BYTES):
        buffer += block
        if skipped:
            end = separator.first_end(buffer)
            drop = end or len(buffer) - len(separator.begun(buffer))
            skipped, newlines, buffer = skipped + drop, newlines + buffer.count(b"\n", 0, drop), buffer[drop:]
            if not end:
                continue
            yield None, skipped, newlines
            skipped = 0
        end = separator.last_end(buffer)
        if end:
            yield buffer[:end], end, buffer.count(b"\n", 0, end)
            buffer = buffer[end:]
        elif len(buffer) > limit:
            skipped = len(buffer) - len(separator.begun(buffer))
            newlines, buffer = buffer.count(b"\n", 0, skipped), buffer[skipped:]
    if skipped:
        yield None, skipped + len(buffer), newlines
    elif buffer:
        yield buffer, len(buffer), buffer.count(b"\n")


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
