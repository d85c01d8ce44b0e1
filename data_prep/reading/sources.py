"""Inputs: files, folders, globs, standard input and data sets; the byte stream of each, decompressed and in UTF-8.

Nothing is left out in silence: files of a folder that are not read are listed, and a file that is not what its name
says is an error.
"""

import bz2
import codecs
import contextlib
import glob
import gzip
import io
import lzma
import os
import re
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import zstandard

from data_prep.reading.records import CHUNK_BYTES, InputFormat
from minimind.errors import UserError, first_line

SUFFIXES: dict[str, InputFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".txt": "txt",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
}
DATASET = "dataset"
"""The format of an input that Hugging Face `datasets` loads."""

_COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
_SIGNATURES = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz"}
_SIGNATURES |= {b"PAR1": ".parquet", b"PK\x03\x04": ".zip", b"%PDF": ".pdf"}
# Longest first: the mark of UTF-32 begins with that of UTF-16.
_BYTE_ORDER_MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_DATASET_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_BUFFER_BYTES = 1 << 18
_HEAD_BYTES = 1 << 16
_SHOWN_NAMES = 5
# A few bad bytes are left to the documents they stand in; with more than this share the encoding is another.
_MOST_INVALID, _FEW_INVALID, _MOST_NUL = 0.3, 8, 0.1


@dataclass(frozen=True)
class Source:
    """One input. `path` is where its bytes are: another place than `name` for standard input and pipes."""

    name: str
    format: str
    compression: str = ""
    path: str = ""
    size: int = 0
    is_val: bool = False


def resolve_sources(
    inputs: Sequence[str], val_inputs: Sequence[str] = (), default_format: InputFormat | None = None
) -> list[Source]:
    """The sources that the words after `--val-input` and `--input` stand for, validation first, in the order given;
    files of a folder or glob are sorted by name.

    Raises:
        UserError: nothing there, a file of unknown format, or the same file twice.
    """
    sources = [s for word in val_inputs for s in _resolve(word, default_format, is_val=True)]
    sources += [s for word in inputs for s in _resolve(word, default_format, is_val=False)]
    seen: dict[str, str] = {}
    for source in sources:
        key = source.name if source.format == DATASET else os.path.realpath(source.path)
        if key in seen:
            raise UserError(f"--input names {source.name} twice (also as {seen[key]}): give each file once")
        seen[key] = source.name
    if not any(not source.is_val for source in sources):
        raise UserError("--input names no file: give a file, folder, glob, - or hf:NAME")
    return sources


@contextlib.contextmanager
def open_source(source: Source) -> Iterator[tuple[io.BufferedReader, BinaryIO]]:
    """(stream, raw): the decompressed bytes, and the file on disk, whose position tells how much has been read.

    What can go wrong while reading becomes one `UserError`."""
    try:
        with open(source.path, "rb", buffering=0) as raw:
            before = os.fstat(raw.fileno())
            if source.compression and not before.st_size:
                raise EOFError(f"it is empty, and no {source.compression} file is")
            yield _buffer(_decompress(raw, source.compression)), cast(BinaryIO, raw)
            after = os.stat(source.path)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise UserError(f"{source.name} changed while it was read: run the same command again when it is complete")
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, zstandard.ZstdError) as error:
        raise UserError(f"{source.name} is damaged or cut short: {error}; get it again or leave it out") from None
    except OSError as error:
        # bz2 has no error class of its own: an OSError without a number.
        problem = f"cannot read {source.name}" if error.errno else f"{source.name} is damaged"
        raise UserError(f"{problem}: {error.strerror or first_line(error)}") from None


def open_text(stream: io.BufferedReader, source: Source, encoding: str) -> io.BufferedReader:
    """The same text in UTF-8, without a byte order mark. Characters that `encoding` cannot read become bytes that are
    no UTF-8 either, so that their document is rejected.

    Raises `UserError` for a file that is no text, or that is plainly not in this encoding.
    """
    head = stream.peek(_HEAD_BYTES)
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if head.startswith(mark)), encoding)
    if codecs.lookup(encoding).name != "utf-8":
        return _buffer(_Pieces(_transcode(stream, encoding)))
    if problem := _find_problem(head):
        raise UserError(f"{source.name} {problem}, or leave the file out")
    if head.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
    return stream


def spool(stream: Any, name: str) -> BinaryIO:
    """The bytes of `stream` in a nameless temporary file, for inputs that must be read twice or from their end."""
    try:
        file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
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


def is_saved_dataset(folder: str) -> bool:
    """Whether `save_to_disk` of Hugging Face datasets wrote this folder."""
    found = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    return "dataset_dict.json" in found or {"dataset_info.json", "state.json"} <= found


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


def _decompress(raw: io.FileIO, compression: str) -> Any:
    if compression == ".zst":
        return _Pieces(_decompress_zstd(raw))
    if compression == ".gz":
        return gzip.GzipFile(fileobj=raw)
    return bz2.BZ2File(raw) if compression == ".bz2" else lzma.LZMAFile(raw) if compression == ".xz" else raw


def _decompress_zstd(raw: io.FileIO) -> Iterator[bytes]:
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


def _resolve(word: str, default_format: InputFormat | None, *, is_val: bool) -> list[Source]:
    if word.startswith("hf:"):
        if word == "hf:":
            raise UserError("--input hf: names no data set: write hf:NAME or hf:FOLDER")
        return [Source(word.removeprefix("hf:"), DATASET, is_val=is_val)]
    if word == "-" or (os.path.exists(word) and not os.path.isfile(word) and not os.path.isdir(word)):
        return [_spool_pipe(word, default_format, is_val)]
    if os.path.isdir(word):
        return _walk_folder(word, is_val)
    if os.path.exists(word):
        return [_describe_file(word, default_format, is_val)]
    if glob.has_magic(word):
        paths = sorted(glob.glob(word, recursive=True))
        # With ** the files of matched folders match by themselves.
        folders = [path for path in paths if os.path.isdir(path) and "**" not in word]
        files = [path for path in paths if not os.path.isdir(path)]
        sources = [_describe_file(path, default_format, is_val) for path in files]
        sources += [source for folder in folders for source in _walk_folder(folder, is_val)]
        if not sources:
            raise UserError(f"--input {word} matches no file")
        return sorted(sources, key=lambda source: source.name)
    if _split_name(word)[0] is None and _DATASET_NAME.fullmatch(word):
        return [Source(word, DATASET, is_val=is_val)]
    raise UserError(f"--input {word} does not exist: no such file or folder")


def _walk_folder(folder: str, is_val: bool) -> list[Source]:
    """Every file of a known format below `folder`; the others are listed on standard error."""
    if is_saved_dataset(folder):
        raise UserError(f"--input {folder} is a data set saved by Hugging Face datasets: give it as hf:{folder}")
    found: list[str] = []
    unread: list[str] = []
    visited: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in visited:  # by a link to a folder above, which would lead round for ever
            folders.clear()
            continue
        visited.add(os.path.realpath(parent))
        unread += [os.path.join(parent, name, "") for name in folders if name.startswith(".")]
        folders[:] = [name for name in sorted(folders) if not name.startswith(".")]
        for name in files:
            path = os.path.join(parent, name)
            # A broken link is an error when it is read; a pipe or a socket would be waited for.
            is_read = _split_name(name)[0] is not None and (os.path.isfile(path) or os.path.islink(path))
            (found if is_read and not name.startswith(".") else unread).append(path)
    if not found:
        known = " ".join(SUFFIXES)
        raise UserError(f"--input {folder} holds no file of a known format ({known}), also compressed")
    if unread:
        names = ", ".join(os.path.relpath(path, folder) for path in sorted(unread)[:_SHOWN_NAMES])
        more = f" and {len(unread) - _SHOWN_NAMES:,} more" if len(unread) > _SHOWN_NAMES else ""
        print(f"note: {folder}: not read (no visible files of a known format): {names}{more}", file=sys.stderr)
    return [_describe_file(path, None, is_val) for path in sorted(found)]


def _describe_file(path: str, default_format: InputFormat | None, is_val: bool) -> Source:
    file_format, compression = _split_name(path)
    file_format = file_format or default_format
    if file_format is None:
        known = ", ".join(SUFFIXES)
        raise UserError(
            f"--input {path} has no known format: name it {known} (and .gz, .zst, .bz2 or .xz after it if "
            "compressed), or give --format"
        )
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return Source(path, file_format, compression, path, size, is_val)


_pipes: list[BinaryIO] = []


def _spool_pipe(word: str, default_format: InputFormat | None, is_val: bool) -> Source:
    if default_format is None:
        raise UserError(f"--input {word} is a stream without a name: say its --format, such as --format jsonl")
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if word == "-" else open(word, "rb") as stream:
            file = spool(stream, "standard input" if word == "-" else word)
    except OSError as error:
        raise UserError(f"cannot read {word}: {error.strerror}") from None
    _pipes.append(file)  # held open: the path below leads to it only as long
    size = os.fstat(file.fileno()).st_size
    return Source(word, default_format, "", f"/proc/self/fd/{file.fileno()}", size, is_val)


def _split_name(path: str) -> tuple[InputFormat | None, str]:
    """(format, compression) by the name: "a.jsonl.gz" is ("jsonl", ".gz")."""
    stem, suffix = os.path.splitext(path.lower())
    compression = suffix if suffix in _COMPRESSIONS else ""
    return SUFFIXES.get(os.path.splitext(stem)[1] if compression else suffix), compression
