"""Which inputs there are: files, globs and data sets by name, and the byte stream behind a compressed file.

Order and identity of the inputs are decided here. Knows nothing of what the files hold.
"""

import codecs
import contextlib
import glob
import gzip
import io
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from minimind.errors import UserError

FORMATS = ("jsonl", "json", "txt", "parquet", "csv")
DATASET = "dataset"
"""The format of an input that Hugging Face `datasets` loads."""

_DATASET_PREFIX = "hf:"
_DATASET_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_ZSTD_BLOCK = 1 << 15
_ZSTD_LARGEST_WINDOW = 1 << 31
_HEAD_BYTES = 4096
_MOST_ODD = 0.1


@dataclass(frozen=True)
class Source:
    """One input. `size` and `modified_ns` are 0 for a data set; `compression` is "", "gz" or "zst"."""

    name: str
    format: str
    compression: str = ""
    size: int = 0
    modified_ns: int = 0


def resolve_sources(inputs: Sequence[str]) -> list[Source]:
    """The sources that the words after `--input` stand for: in the order given, a glob's files sorted by name.

    A word is a file, a glob, `hf:NAME`, a folder, or a data set's name (the last three are for `datasets`).

    Raises:
        UserError: nothing there, a file of unknown format, or the same file twice.
    """
    sources = [source for word in inputs for source in _resolve_word(word)]
    seen: dict[str, str] = {}
    for source in sources:
        key = source.name if source.format == DATASET else os.path.realpath(source.name)
        if key in seen:
            raise UserError(f"--input names {source.name} twice (also as {seen[key]}): give each file once")
        seen[key] = source.name
    if not sources:
        raise UserError("--input names no file")
    return sources


@contextlib.contextmanager
def open_source(source: Source) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """(stream, raw): the decompressed bytes, and the file on disk, whose position tells how much has been read."""
    with open(source.name, "rb") as raw:
        if source.compression == "gz":
            with gzip.GzipFile(fileobj=raw) as stream:
                yield stream, raw  # type: ignore[misc]
        elif source.compression == "zst":
            yield io.BufferedReader(_ZstdStream(raw), 1 << 18), raw
        else:
            yield raw, raw


@contextlib.contextmanager
def read_errors(source: Source) -> Iterator[None]:
    """Turn what can go wrong with a file on disk into one clear line."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise UserError(f"{source.name} is damaged or cut short: {error}; get it again") from None
    except OSError as error:
        raise UserError(f"cannot read {source.name}: {error.strerror or error}") from None


def find_non_text(head: bytes) -> str | None:
    """Why a file that begins with these bytes is no UTF-8 text, or None. A few bad bytes are left to the documents."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "not UTF-8 text but UTF-16: convert the file"
    odd = head.count(b"\0") + head.decode("utf-8", "replace").count("\ufffd")
    return "not a text file (binary data)" if b"\0" in head and odd > _MOST_ODD * len(head) else None


def read_head(stream: BinaryIO) -> bytes:
    """The first bytes, enough for `find_non_text`."""
    return stream.read(_HEAD_BYTES)


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of one or several zstd frames. (The library's own reader takes a file that was cut short for
    one that ends.)"""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame = self._new_frame()
        self._inside = False
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            if not self._compressed:
                self._compressed = self._raw.read(_ZSTD_BLOCK)
            if not self._compressed:
                if self._inside:
                    raise EOFError("the last zstd frame has no end")
                return 0
            self._ready = memoryview(self._frame.decompress(self._compressed))
            self._compressed = self._frame.unused_data
            self._inside = not self._frame.eof
            if self._frame.eof:
                self._frame = self._new_frame()
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    @staticmethod
    def _new_frame() -> Any:
        return zstandard.ZstdDecompressor(max_window_size=_ZSTD_LARGEST_WINDOW).decompressobj()


def _resolve_word(word: str) -> list[Source]:
    if word.startswith(_DATASET_PREFIX):
        return [Source(word.removeprefix(_DATASET_PREFIX), DATASET)]
    if os.path.isdir(word):
        return [Source(word, DATASET)]
    if os.path.exists(word):
        return [_describe_file(word)]
    if glob.has_magic(word):
        files = sorted(path for path in glob.glob(word, recursive=True) if os.path.isfile(path))
        if not files:
            raise UserError(f"--input {word} matches no file")
        return [_describe_file(path) for path in files]
    if _split_name(word)[0] is None and _DATASET_NAME.fullmatch(word):
        return [Source(word, DATASET)]
    raise UserError(f"--input {word} does not exist: no such file or folder")


def _describe_file(path: str) -> Source:
    file_format, compression = _split_name(path)
    if file_format is None:
        known = ", ".join(f".{name}" for name in FORMATS)
        raise UserError(f"--input {path} has no known format: name it {known}, and .gz or .zst behind if compressed")
    status = os.stat(path)
    return Source(path, file_format, compression, status.st_size, status.st_mtime_ns)


def _split_name(path: str) -> tuple[str | None, str]:
    """(format, compression) by the name: "a.jsonl.gz" is ("jsonl", "gz")."""
    suffixes = [suffix[1:].lower() for suffix in Path(path).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in ("gz", "zst") else ""
    return (suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None), compression
