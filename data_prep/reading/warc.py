"""Text records of WARC files (ISO 28500), such as Common Crawl's WET: each is a document.

Pages in HTML are none: taking text out of them is a trade of its own.
"""

import io
from collections.abc import Iterator

from data_prep.reading.records import CHUNK_BYTES, Record, Rejected, reject_long
from minimind.errors import UserError

_MOST_HEADER_BYTES = 1 << 16
_NO_DOCUMENTS = ("warcinfo", "request", "metadata", "revisit", "continuation")


def read_warc(stream: io.BufferedReader, name: str, limit: int) -> Iterator[Record]:
    """(number of the record from 1, its text in UTF-8), of no more than `limit` bytes.

    Raises:
        UserError: the file is no WARC file, or is cut short.
    """
    number = 0
    while headers := _read_headers(stream, name, number + 1):
        number += 1
        size = _length_of(headers, name, number)
        kind, media = headers.get("warc-type", ""), headers.get("content-type", "").split(";")[0].strip().lower()
        is_text = media == "text/plain" and kind in ("conversion", "resource")
        block = _read_block(stream, size, keep=is_text and size <= limit, where=f"{name}: record {number}")
        if is_text:
            yield number, block if size <= limit else reject_long(limit)
        elif kind not in _NO_DOCUMENTS:
            yield (
                number,
                Rejected(f"a {kind} of type {media or 'none'}, not text: give WET files"),
            )


def _read_headers(stream: io.BufferedReader, name: str, number: int) -> dict[str, str] | None:
    """The named fields of the next record, names in lower case; None at the end."""
    line = b"\r\n"
    while line in (b"\r\n", b"\n"):
        line = stream.readline(_MOST_HEADER_BYTES)
    if not line:
        return None
    if not line.startswith(b"WARC/"):
        raise UserError(f"{name}: record {number} does not begin with WARC/: the file is none, or is damaged")
    headers: dict[str, str] = {}
    total = 0
    while (line := stream.readline(_MOST_HEADER_BYTES)) not in (b"\r\n", b"\n"):
        total += len(line)
        if not line.endswith(b"\n") or total > _MOST_HEADER_BYTES:
            raise UserError(f"{name} is damaged or cut short in the headers of record {number}")
        key, _, value = line.decode("utf-8", "replace").partition(":")
        headers[key.strip().lower()] = value.strip()
    return headers


def _length_of(headers: dict[str, str], name: str, number: int) -> int:
    length = headers.get("content-length", "")
    if not (length.isascii() and length.isdigit()):
        raise UserError(f"{name} is damaged: record {number} has the Content-Length {length!r}")
    return int(length)


def _read_block(stream: io.BufferedReader, size: int, *, keep: bool, where: str) -> bytes:
    parts, left = [], size
    while left:
        part = stream.read(min(left, CHUNK_BYTES))
        if not part:
            raise UserError(f"{where} is cut short: {left:,} of its {size:,} bytes are missing; get the file again")
        parts += [part] if keep else []
        left -= len(part)
    return b"".join(parts)
