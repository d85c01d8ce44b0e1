"""The byte stream of one input: decompressed, in UTF-8, and checked to be what its name says."""

import bz2
import codecs
import contextlib
import gzip
import hashlib
import io
import lzma
import os
import re
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import zstandard

from data_prep.reading.records import CHUNK_BYTES
from minimind.errors import UserError, first_line
from minimind.host import PROC
from minimind.remote import RemoteFile, describe, url_of

_SIGNATURES = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz"}
_SIGNATURES |= {b"PAR1": ".parquet", b"PK\x03\x04": ".zip", b"%PDF": ".pdf"}
# Longest first: the mark of UTF-32 begins with that of UTF-16.
_BYTE_ORDER_MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_BUFFER_BYTES = 1 << 18
_HEAD_BYTES = 1 << 16
# A few bad bytes are left to the documents they stand in; with more than this share the encoding is another.
_MOST_INVALID, _FEW_INVALID, _MOST_NUL = 0.3, 8, 0.1


@dataclass(frozen=True)
class Source:
    """One input. `path` is where its bytes are: another place than `name` for standard input and pipes, and a URL with
    its query for a remote file."""

    name: str
    format: str
    compression: str = ""
    path: str = ""
    size: int = 0
    is_val: bool = False


@contextlib.contextmanager
def open_source(source: Source) -> Iterator[tuple[io.BufferedReader, BinaryIO]]:
    """(stream, raw): the decompressed bytes, and the file on disk, whose position tells how much has been read.

    What can go wrong while reading becomes one `UserError`."""
    try:
        with RemoteFile(source.path) if is_url(source.path) else open(source.path, "rb", buffering=0) as raw:
            before = find_state(source.path)
            if source.compression and not before[0]:
                raise EOFError(f"it is empty, and no {source.compression} file is")
            yield _buffer(_decompress(raw, source.compression)), cast(BinaryIO, raw)
        if before != find_state(source.path):
            raise UserError(f"{source.name} changed while it was read: run the same command again when it is complete")
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, zstandard.ZstdError) as error:
        raise UserError(f"{source.name} is damaged or cut short: {error}; get it again or leave it out") from None
    except OSError as error:
        # bz2 has no error class of its own: an OSError without a number.
        problem = f"cannot read {source.name}" if error.errno else f"{source.name} is damaged"
        raise UserError(f"{problem}: {error.strerror or first_line(error)}") from None


def find_state(path: str) -> tuple[int, object]:
    """(size in bytes, what is another when the contents are)."""
    if is_url(path):
        return describe(path)
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def is_url(path: str) -> bool:
    """Whether a source is a remote file."""
    return url_of(path) is not None


def hash_remote(path: str) -> str:
    """A sha256 that stands for a remote file's contents: of what its store tells them apart by, and where that is
    nothing, of all bytes."""
    size, version = describe(path)
    if version:
        return hashlib.sha256(f"{size} {version}".encode()).hexdigest()
    digest = hashlib.sha256()
    with RemoteFile(path) as raw:
        while block := raw.read(CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def open_text(stream: io.BufferedReader, source: Source, encoding: str) -> io.BufferedReader:
    """The same text in UTF-8, without a byte order mark. Characters that `encoding` cannot read become bytes that are
    no UTF-8 either, so that their document is rejected.

    Raises `UserError` for a file that is no text, or that is plainly not in this encoding.
    """
    head = stream.peek(_HEAD_BYTES)
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if head.startswith(mark)), encoding)
    if codecs.lookup(encoding).name != "utf-8":
        return _buffer(_Pieces(_transcode(stream, encoding)))
    if problem := _find_problem(head) or _find_other_lines(head, source.format):
        raise UserError(f"{source.name} {problem}, or leave the file out")
    if head.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
    return stream


def spool(stream: Any, name: str) -> BinaryIO:
    """The bytes of `stream` in a temporary file, for inputs that must be read twice or from their end. It is nameless
    where the system can open such a file again by its number."""
    make = tempfile.TemporaryFile if (PROC / "self/fd").is_dir() else tempfile.NamedTemporaryFile
    try:
        file = make()
        while block := stream.read(CHUNK_BYTES):
            try:
                file.write(block)
            except OSError as error:
                error.filename = tempfile.gettempdir()
                raise
        file.seek(0)
    except OSError as error:
        if error.filename is None:
            raise
        reason = f"{name} is copied to the temporary folder {error.filename}, which cannot hold it: {error.strerror}"
        raise UserError(f"{reason}; set TMPDIR to a folder with more room") from None
    return cast(BinaryIO, file)


def _find_problem(head: bytes) -> str | None:
    """Why a file that begins with these bytes is not UTF-8 text, and the fix; None if it may be."""
    for signature, suffix in _SIGNATURES.items():
        if head.startswith(signature):
            fix = "convert it to text" if suffix in (".zip", ".pdf") else f"add {suffix} to its name"
            return f"is no text but {suffix} data: {fix}"
    odd, even = head[1::2].count(0), head[::2].count(0)
    if odd + even > max(_FEW_INVALID, _MOST_NUL * len(head)):
        if min(odd, even) * 10 > max(odd, even):
            return "is binary data, not text: convert it"
        return f"is not UTF-8 but looks like UTF-16: give --encoding utf-16-{'le' if odd > even else 'be'}"
    invalid = head.decode("utf-8", "replace").count("\ufffd") - head.count("\ufffd".encode())
    foreign = sum(map(len, re.findall(rb"[\x80-\xff]+", head)))
    if invalid < _FEW_INVALID or invalid < _MOST_INVALID * foreign:
        return None
    if b"\0" in head:
        return "is binary data, not text: convert it"
    # Western text has single letters beyond ASCII, in Chinese, Japanese and Korean encodings they come in runs.
    pairs = sum(map(len, re.findall(rb"[\x80-\xff]{2,}", head)))
    for encoding in ("gb18030", "big5", "shift_jis", "euc_kr") if pairs > foreign / 2 else ("cp1252",):
        with contextlib.suppress(UnicodeDecodeError):
            codecs.getincrementaldecoder(encoding)().decode(head)
            return f"is not UTF-8 but looks like {encoding}: give --encoding {encoding}"
    return "is not UTF-8 text: give its --encoding"


def _find_other_lines(head: bytes, file_format: str) -> str | None:
    """Why a file that is read by line is one line, which would count as one bad document; None if it is not."""
    if file_format == "jsonl" and head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        return "is a JSON array, not an object a line: name it .json"
    if file_format in ("jsonl", "txt") and b"\r" in head.rstrip() and b"\n" not in head:
        return "ends its lines with CR alone: convert them to LF (tr '\\r' '\\n')"
    return None


class _Pieces(io.RawIOBase):
    """An iterator of bytes as a raw stream."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest and (piece := next(self._pieces, None)) is not None:
            self._rest = memoryview(piece)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def _buffer(raw: Any) -> io.BufferedReader:
    return io.BufferedReader(raw, _BUFFER_BYTES)


def _decompress(raw: Any, compression: str) -> Any:
    if compression == ".zst":
        return _Pieces(_decompress_zstd(raw))
    if compression == ".gz":
        return gzip.GzipFile(fileobj=raw)
    return bz2.BZ2File(raw) if compression == ".bz2" else lzma.LZMAFile(raw) if compression == ".xz" else raw


def _decompress_zstd(raw: io.RawIOBase) -> Iterator[bytes]:
    # The library's own reader takes a file that was cut short for one that ends, and arrow's refuses large windows.
    frame, is_inside = None, False
    while block := raw.read(1 << 15):
        while block:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            yield frame.decompress(block)
            is_inside, block = not frame.eof, frame.unused_data
            frame = None if frame.eof else frame
    if is_inside:
        raise EOFError("the last zstd frame has no end")


def _transcode(stream: io.BufferedReader, encoding: str) -> Iterator[bytes]:
    codecs.register_error("mark_undecodable", lambda error: ("\ud800", error.end))  # type: ignore[attr-defined]
    decoder = codecs.getincrementaldecoder(encoding)("mark_undecodable")
    while block := stream.read(_BUFFER_BYTES):
        yield decoder.decode(block).encode("utf-8", "surrogatepass")
    yield decoder.decode(b"", final=True).encode("utf-8", "surrogatepass")
