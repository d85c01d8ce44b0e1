"""Inputs: files, folders, globs, standard input and data sets.

Nothing is left out in silence: files of a folder that are not read are listed.
"""

import contextlib
import glob
import os
import re
import sys
from collections.abc import Sequence
from typing import BinaryIO, NoReturn

from data_prep.reading.byte_stream import Source, is_url, spool
from data_prep.reading.records import InputFormat
from minimind.data.shards import BAD_DOCUMENTS_NAME, CORPUS_NAME, SPLITS
from minimind.errors import UserError
from minimind.host import PROC
from minimind.remote import describe, glob_files, join_url, list_files, redact

SUFFIXES: dict[str, InputFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".txt": "txt",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".warc": "warc",
    ".wet": "warc",
}
DATASET = "dataset"
"""The format of an input that Hugging Face `datasets` loads."""

_COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
_DATASET_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_SHOWN_NAMES = 5
_CORPUS_PARTS = (CORPUS_NAME, BAD_DOCUMENTS_NAME, *SPLITS)


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
        is_file = source.format != DATASET and not is_url(source.path)
        key = os.path.realpath(source.path) if is_file else source.name
        if key in seen:
            raise UserError(f"--input names {source.name} twice (also as {seen[key]}): give each file once")
        seen[key] = source.name
    if not any(not source.is_val for source in sources):
        raise UserError("--input names no file: give a file, folder, glob, - or hf:NAME")
    return sources


def is_saved_dataset(folder: str) -> bool:
    """Whether `save_to_disk` of Hugging Face datasets wrote this folder."""
    found = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    return "dataset_dict.json" in found or {"dataset_info.json", "state.json"} <= found


def _resolve(word: str, default_format: InputFormat | None, *, is_val: bool) -> list[Source]:
    if word.startswith("hf:"):
        if word == "hf:":
            raise UserError("--input hf: names no data set: write hf:NAME or hf:FOLDER")
        return [Source(word.removeprefix("hf:"), DATASET, is_val=is_val)]
    if is_url(word):
        return _list_remote(word, default_format, is_val)
    if word == "-" or (os.path.exists(word) and not os.path.isfile(word) and not os.path.isdir(word)):
        return [_spool_pipe(word, default_format, is_val)]
    if os.path.isdir(word):
        return _walk_folder(word, is_val)
    if os.path.exists(word):
        return [_describe_file(word, default_format, is_val)]
    if glob.has_magic(word):
        # With ** the files of matched folders match by themselves.
        paths = [path for path in glob.glob(word, recursive=True) if "**" not in word or not os.path.isdir(path)]
        sources = [source for path in paths for source in _resolve(path, default_format, is_val=is_val)]
        if not sources:
            raise UserError(f"--input {word} matches no file")
        return sorted(sources, key=lambda source: source.name)
    if _split_name(word)[0] is None and _DATASET_NAME.fullmatch(word):
        return [Source(word, DATASET, is_val=is_val)]
    raise UserError(f"--input {word} does not exist: no such file or folder")


def _list_remote(word: str, default_format: InputFormat | None, is_val: bool) -> list[Source]:
    """A remote file, the files of known formats below a remote folder, or those that a pattern matches."""
    path = word.split("?")[0]
    if glob.has_magic(path):
        urls = glob_files(word)
        if not urls:
            raise UserError(f"--input {redact(word)} matches no file")
    elif _split_name(path)[0] is not None or default_format is not None:
        urls = [word]
    else:
        found = [name for name in sorted(list_files(word, recursive=True)) if _split_name(name)[0] is not None]
        urls = [join_url(word, name) for name in found if not any(part.startswith(".") for part in name.split("/"))]
        if not urls:
            raise UserError(f"--input {redact(word)} is no file or folder with files of a known format")
    sources = []
    for url in urls:
        # The query may be a signature: it is no part of the name that goes into corpus.json.
        file_format, compression = _split_name(url.split("?")[0])
        if (file_format := file_format or default_format) is None:
            raise UserError(f"--input {redact(url)} has no known format: give --format")
        sources.append(Source(redact(url).split("?")[0], file_format, compression, url, describe(url)[0], is_val))
    return sources


def _walk_folder(folder: str, is_val: bool) -> list[Source]:
    """Every file of a known format below `folder`; the others are listed on standard error."""

    def stop(error: OSError) -> NoReturn:
        raise UserError(f"cannot read {error.filename}: {error.strerror}; make it readable or leave it out")

    found: list[str] = []
    unread: list[str] = []
    visited: set[str] = set()
    for parent, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        if os.path.realpath(parent) in visited:  # by a link to a folder above, which would lead round for ever
            folders.clear()
            continue
        visited.add(os.path.realpath(parent))
        if is_saved_dataset(parent):
            raise UserError(f"--input {parent} is a data set saved by Hugging Face datasets: give it as hf:{parent}")
        # A corpus that was prepared here is no text, nor is what it says about itself.
        own = _CORPUS_PARTS if CORPUS_NAME in files and "train" in folders else ()
        unread += [os.path.join(parent, name) for name in (*folders, *files) if name in own]
        files, folders[:] = ([name for name in names if name not in own] for names in (files, folders))
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
    path = file.name if isinstance(file.name, str) else f"{PROC}/self/fd/{file.name}"
    return Source(word, default_format, "", path, size, is_val)


def _split_name(path: str) -> tuple[InputFormat | None, str]:
    """(format, compression) by the name: "a.jsonl.gz" is ("jsonl", ".gz")."""
    stem, suffix = os.path.splitext(path.lower())
    compression = suffix if suffix in _COMPRESSIONS else ""
    return SUFFIXES.get(os.path.splitext(stem)[1] if compression else suffix), compression
