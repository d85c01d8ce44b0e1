"""Cuts every input into chunks of about half a megabyte of documents, for any process to parse.

Memory grows neither with the input nor with a line that is too long. Where a chunk ends depends on the input alone.
"""

import contextlib
import io
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import data_prep.reading.json_values as json_values
from data_prep.reading.byte_stream import Source, open_source, open_text, spool
from data_prep.reading.records import CHUNK_BYTES, ReadOptions, Record, Rejected, reject_long
from data_prep.reading.sources import DATASET
from data_prep.reading.tables import read_csv, read_dataset, read_parquet
from data_prep.reading.warc import read_warc

# White space of Unicode in UTF-8: a line of ideographic spaces is blank too.
_is_blank = re.compile(
    rb"(?:[\t-\r\x1c-\x20]|\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80)*\Z"
).match

_Lines = Iterator[tuple[int, bytes | None]]
"""(number of the first line, bytes); None for what is too long."""


@dataclass(frozen=True)
class Chunk:
    """Documents of one source with their line or row numbers: texts, or lines of JSON that are still to be parsed."""

    source: Source
    records: tuple[Record, ...]
    progress: int
    """Bytes of the file on disk that this chunk stands for."""


def cut_source(source: Source, options: ReadOptions) -> Iterator[Chunk]:
    """The chunks of one source, in order. Raises `UserError` for a file that cannot be read to its end."""
    if source.format == DATASET:
        yield from _pack(source, read_dataset(source, options), lambda: 0)
        return
    with open_source(source) as (stream, raw):
        if source.format == "warc":
            yield from _pack(source, read_warc(stream, source.name, options.max_document_bytes), raw.tell)
            return
        if source.format != "parquet":
            records = _read_text_format(open_text(stream, source, options.encoding), source, options)
            yield from _pack(source, records, raw.tell)
            return
        # Its index is at the end, so that a compressed file is unpacked first.
        with spool(stream, source.name) if source.compression else contextlib.nullcontext(stream) as file:
            yield from _pack(source, read_parquet(file, source, options), raw.tell)


def _read_text_format(stream: io.BufferedReader, source: Source, options: ReadOptions) -> Iterator[Record]:
    limit = options.max_document_bytes
    if source.format == "json":
        for line, value, size in json_values.iterate(stream.read, source.name, CHUNK_BYTES, limit):
            yield line, options.find_text(value) if size <= limit else reject_long(limit)
    elif source.format in ("csv", "tsv"):
        yield from read_csv(stream, source, options)
    else:
        read = _read_lines
        if source.format == "txt":
            read = {"line": _read_lines, "paragraph": _read_paragraphs, "document": _read_whole}[options.txt_documents]
        for line, data in read(stream, limit):
            if data is None:
                yield line, reject_long(limit)
            elif not _is_blank(data):
                yield line, data


def _read_lines(stream: io.BufferedReader, limit: int) -> _Lines:
    """Lines without their end, which may be \\n or \\r\\n."""
    number = 0
    while line := stream.readline(limit + 2):
        number += 1
        data = line.removesuffix(b"\n").removesuffix(b"\r")
        yield number, data if len(data) <= limit else None
        while not line.endswith(b"\n") and (line := stream.readline(CHUNK_BYTES)):
            pass


def _read_paragraphs(stream: io.BufferedReader, limit: int) -> _Lines:
    """Runs of lines that are not blank."""
    first, size = 0, -1
    paragraph: list[bytes] = []
    for number, line in itertools.chain(_read_lines(stream, limit), [(0, b"")]):
        if line is not None and _is_blank(line):
            if first:
                yield first, b"\n".join(paragraph) if size <= limit else None
            first, size = 0, -1
            paragraph.clear()
            continue
        first = first or number
        size += limit + 2 if line is None else len(line) + 1
        if line is not None and size <= limit:
            paragraph.append(line)


def _read_whole(stream: io.BufferedReader, limit: int) -> _Lines:
    data: bytes | None = stream.read(limit + 1).replace(b"\r\n", b"\n")
    while stream.read(CHUNK_BYTES):  # to its end, where damage shows
        data = None
    yield 1, data


def _pack(source: Source, records: Iterable[Record], tell: Callable[[], int]) -> Iterator[Chunk]:
    """Records in chunks of about `CHUNK_BYTES`; `tell` says how much of the file has been read."""
    packed: list[Record] = []
    total = done = 0
    for line, text in records:
        packed.append((line, text))
        total += 64 + (0 if isinstance(text, Rejected) else len(text))
        if total >= CHUNK_BYTES:
            yield Chunk(source, tuple(packed), tell() - done)
            packed, total, done = [], 0, tell()
    if packed:
        yield Chunk(source, tuple(packed), tell() - done)
