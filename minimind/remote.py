"""Files in object stores and on web servers, by fsspec: `s3://`, `gs://`, `hf://`, `https://` and what else it knows.

Reads by ranges and tries again what may pass: a 503, a connection that is cut. What does not becomes one line, in which
no credentials stand. Knows nothing of what the files hold.
"""

import hashlib
import io
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.registry import known_implementations

from minimind.errors import UserError, first_line
from minimind.files import new_file

T = TypeVar("T")

RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Between two tries of one request."""
_BLOCK_BYTES = 1 << 24
# Also as a path has it, which makes one slash of two.
_URL = re.compile(r"([a-z][a-z0-9+]+):/+(.+)", re.DOTALL)
_VERSIONS = (
    *("ETag", "etag", "md5Hash", "md5", "Content-MD5", "Digest", "oid", "xet_hash", "generation"),
    *("LastModified", "Last-Modified", "last_modified", "last_commit", "updated", "mtime", "modified", "created"),
)


class RemoteError(UserError):
    """A file or folder elsewhere that cannot be read or written."""


def url_of(path: str | os.PathLike[str]) -> str | None:
    """The URL that a word or a path of the command line is; None for a local path.

    Raises:
        RemoteError: it has a user or password, which would end up in logs.
    """
    match = _URL.fullmatch(os.fspath(path))
    if match is None or match[1] not in known_implementations or match[1] in ("file", "local"):
        return None
    if "@" in match[2].split("/")[0]:
        raise RemoteError(f"{match[1]}://...@...: give credentials by the environment, not in the address")
    return f"{match[1]}://{match[2]}"


def redact(text: str) -> str:
    """`text` without what a URL in it may carry: user and password, and the query, where signatures stand."""
    return re.sub(r"\?[^\s'\")]+?(?=[:,;]?(?:[\s'\")]|$))", "?...", re.sub(r"(\w://)[^/\s@]*@", r"\1", text))


def join_url(url: str, name: str) -> str:
    """The URL of a file in a folder."""
    return f"{url.rstrip('/')}/{name}"


def describe(url: str) -> tuple[int, str]:
    """(size in bytes, a word that changes with the content, or "" where the store gives none).

    Raises:
        RemoteError: there is no such file, or it cannot be asked for.
    """
    info = _request(url, lambda fs, path: fs.info(path))
    if info.get("size") is None:
        raise RemoteError(f"{redact(url)}: the server does not say its size, without which a cut goes unseen")
    return int(info["size"]), " ".join(str(info[name]) for name in _VERSIONS if info.get(name))


def list_files(url: str, *, recursive: bool = False) -> dict[str, int | None]:
    """Name -> size of the files in a folder (None: the store's list does not say); with `recursive` below it too, by
    their relative names. Empty where there is no such folder. Raises `RemoteError` where it cannot be listed."""

    def find(fs: Any, path: str) -> dict[str, int | None]:
        fs.invalidate_cache()
        if not _is_there(fs, path):
            return {}
        found = fs.find(path, maxdepth=None if recursive else 1, detail=True)
        base = fs._strip_protocol(path).rstrip("/") + "/"
        return {name.removeprefix(base): info.get("size") for name, info in found.items()}

    return _request(url, find)


def glob_files(url: str) -> list[str]:
    """The URLs of the files that a pattern matches, sorted."""
    return _request(url, lambda fs, path: sorted(fs.unstrip_protocol(name) for name in fs.glob(path)))


def exists(url: str) -> bool:
    """Whether there is such a file or folder."""
    return _request(url, _is_there)


def _is_there(fs: Any, path: str) -> bool:
    # fsspec's own `exists` takes a server that fails for a file that is missing.
    try:
        fs.info(path)
    except FileNotFoundError as error:
        if _may_pass(error):
            raise
        return False
    return True


class RemoteFile(io.RawIOBase):
    """A file elsewhere as a seekable raw stream, read in blocks, each tried again by itself."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.size, self.version = describe(url)
        self._position = self._start = 0
        self._block = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self.size or not len(buffer):
            return 0
        at = self._position - self._start
        if not 0 <= at < len(self._block):
            end = min(self.size, self._position + _BLOCK_BYTES)
            self._block, self._start, at = read_range(self.url, self._position, end, self.size), self._position, 0
        piece = self._block[at : at + len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)


def read_range(url: str, start: int, end: int, size: int) -> bytes:
    """Bytes [start, end) of a file of `size` bytes. Raises `RemoteError` when they do not come."""

    def read(fs: Any, path: str) -> bytes:
        data = fs.cat_file(path, start=start, end=end)
        if len(data) == size != end - start:
            data = data[start:end]  # a server that knows no ranges has sent all
        if len(data) != end - start:
            raise OSError(f"{len(data):,} of {end - start:,} bytes came")
        return data

    return _request(url, read) if end > start else b""


def read_bytes(url: str) -> bytes:
    """A whole small file."""
    size = describe(url)[0]
    return read_range(url, 0, size, size)


def fetch(url: str, path: Path, sha256: str | None = None) -> None:
    """Copy a file to `path`, whole or not at all.

    Raises:
        RemoteError: it cannot be read, changes meanwhile, or has not this sha256.
        OSError: the disk refuses.
    """
    size, version = describe(url)
    digest = hashlib.sha256()
    with new_file(path) as temporary, open(temporary, "wb") as file:
        for start in range(0, size, _BLOCK_BYTES):
            block = read_range(url, start, min(size, start + _BLOCK_BYTES), size)
            digest.update(block)
            file.write(block)
        if describe(url) != (size, version):
            raise RemoteError(f"{redact(url)} changed while it was read: run the same command again")
        if sha256 is not None and digest.hexdigest() != sha256:
            raise RemoteError(f"{redact(url)} is damaged: its sha256 is {digest.hexdigest()}, not {sha256}")


def store(path: Path, url: str) -> None:
    """Copy a local file to a URL; stores show a file when it is complete. Raises `RemoteError`."""

    def put(fs: Any, target: str) -> None:
        fs.makedirs(fs._parent(target), exist_ok=True)
        fs.put_file(str(path), target)
        fs.invalidate_cache()
        if (there := fs.info(target)["size"]) != (here := path.stat().st_size):
            raise OSError(f"{there:,} of {here:,} bytes arrived")

    _request(url, put, "write")


def store_folder(folder: Path, url: str, marks: tuple[str, ...], journal: Path | None = None) -> None:
    """Copy all files below `folder`; those named in `marks`, which say that the others are complete, go there first and
    come at the end, in this order.

    Args:
        journal: notes what has arrived: interrupted, the same call goes on.

    Raises:
        RemoteError: a file does not arrive.
    """
    there = list_files(url, recursive=True)
    files = [path for path in folder.rglob("*") if path.is_file()]
    files.sort(key=lambda path: (marks.index(path.name) + 1 if path.name in marks else 0, path))
    stored = set(journal.read_text(encoding="utf-8").splitlines()) if journal and journal.exists() else set()
    for name in [name for name in there if name.rpartition("/")[2] in marks]:
        _request(join_url(url, name), lambda fs, path: fs.rm_file(path), "write")
    for path in files:
        name, size = path.relative_to(folder).as_posix(), path.stat().st_size
        line = f"{name} {size} {path.stat().st_mtime_ns}"
        if path.name in marks or line not in stored or there.get(name) != size:
            store(path, join_url(url, name))
            if journal:
                with open(journal, "a", encoding="utf-8") as file:
                    file.write(line + "\n")


def _request(url: str, function: Callable[[Any, str], T], what: str = "read") -> T:
    """`function(file system, path)`, again after a while if what went wrong may pass."""
    for wait in (*RETRY_SECONDS, None):
        try:
            fs, path = fsspec.core.url_to_fs(url)
            return function(fs, path)
        except UserError:
            raise
        except Exception as error:  # each store's library has its own kinds
            problem = _explain(error)
            if wait is None or not _may_pass(error):
                tries = "" if wait is not None else f" ({len(RETRY_SECONDS) + 1} tries)"
                raise RemoteError(f"cannot {what} {redact(url)}: {redact(problem)}{tries}") from None
        time.sleep(wait)
    raise AssertionError


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error."""
    for inner in _chain(error):
        response = getattr(inner, "response", None)
        for found in (getattr(inner, "status", None), getattr(response, "status_code", None)):
            if isinstance(found, int):
                return found
        if isinstance(response, dict):  # botocore
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return None


def _may_pass(error: BaseException) -> bool:
    if (status := _status(error)) is not None:
        return status >= 500 or status in (408, 429)
    if any(isinstance(inner, (ConnectionError, TimeoutError)) or _is_of_aiohttp(inner) for inner in _chain(error)):
        return True  # fsspec calls a server that is not reached a file that is not found
    return not isinstance(error, (FileNotFoundError, PermissionError, ImportError, ValueError, NotImplementedError))


def _is_of_aiohttp(error: BaseException) -> bool:
    return type(error).__module__.startswith("aiohttp")


def _explain(error: Exception) -> str:
    """What went wrong in a few words."""
    status = _status(error)
    if isinstance(error, ImportError):
        return f"{first_line(error)}; install the package that reads it (s3fs, gcsfs or huggingface_hub)"
    if status is not None and (status >= 500 or status == 429):
        return f"the server answers {status}"
    if isinstance(error, FileNotFoundError) and (status == 404 or not _may_pass(error)):
        return "no such file or folder"
    if isinstance(error, FileNotFoundError):
        error = next(inner for inner in _chain(error) if inner is not error)  # type: ignore[assignment]
    return f"{type(error).__name__}: {first_line(error)}"
