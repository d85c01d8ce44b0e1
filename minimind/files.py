"""Files and folders that are written whole or not at all.

Data is written under a temporary name in the same folder, flushed to disk and renamed. Errors of the operating system
(`OSError`) go through unchanged.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import resource
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minimind.errors import UserError, first_line

PARTIAL_SUFFIX = ".partial"

ROOT = Path(__file__).resolve().parent.parent
"""The repository, or the folder that the package is installed in."""

_CHUNK_BYTES = 1 << 20
_MOST_OPEN = 1 << 17  # programs that close every possible descriptor take seconds beyond


def temporary_name(path: str | os.PathLike[str]) -> Path:
    """Where this process writes `path` until it is complete: hidden, in the same folder."""
    path = Path(path)
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name to write under: the file becomes `path`, flushed to disk, when the block ends, and goes if it raises."""
    path = Path(path)
    temporary = temporary_name(path)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    fsync_folder(path.parent)


def replace_file(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `path`; readers, and a crash at any moment, find the old file or the new one."""
    with new_file(path) as temporary:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike[str], fix: str = "") -> Iterator[None]:
    """A full disk, or a `path` that cannot be written, becomes one `UserError`; `fix` ends its line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {error.filename or path}: {error.strerror or error}{fix}") from error


def fsync_folder(path: str | os.PathLike[str]) -> None:
    """Make the names in a folder durable (new files, renames, removals)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and user-space file systems have no fsync for folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def hash_file(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file's content in hexadecimal, read in chunks: constant memory."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def raise_open_files() -> int:
    """Let this process hold as many files and connections open as the system allows it, and give that limit. The usual
    soft limit of 1,024 is for programs that wait with `select`; it ends rank 0 of a large run, or closes a corpus's
    shards again and again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_OPEN if hard == resource.RLIM_INFINITY else min(hard, _MOST_OPEN)
    while soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):  # a sandbox may refuse, macOS what is beyond its kernel
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            return most
        most //= 2
    return _MOST_OPEN if soft == resource.RLIM_INFINITY else soft


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    replace_file(path, json.dumps(content, indent=2) + "\n")


def read_json(path: str | os.PathLike[str], what: str) -> Any:
    """The parsed JSON of a file that the user named.

    Raises:
        UserError: it cannot be read, or is no JSON (naming line and column).
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{what} {path}: {error.strerror or error}; give the path of a readable file") from None
    except UnicodeDecodeError:
        raise UserError(f"{what} {path}: not UTF-8 text; give a JSON file") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{what} {path}: line {error.lineno} column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise UserError(f"{what} {path}: no reasonable JSON: {first_line(error)}") from None


def partial_folder(final: Path) -> Path:
    """A unique name beside `final`: a dying job may still be writing under its own."""
    return final.with_name(f"{final.name}.{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}")


def publish(partial: Path, final: Path) -> None:
    """Rename a folder to `final`, durably. An existing `final` is first renamed, then deleted."""
    if final.exists():
        aside = partial_folder(final)
        os.replace(final, aside)
        os.replace(partial, final)
        fsync_folder(final.parent)
        shutil.rmtree(aside, ignore_errors=True)  # a network file system keeps what another process has open
    else:
        os.replace(partial, final)
        fsync_folder(final.parent)


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder to fill; it is published as `final` when the block ends, and removed if the block raises."""
    partial = partial_folder(final)
    try:
        partial.mkdir(parents=True)
        yield partial
        publish(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class FolderLock:
    """Keeps other processes out of a folder until `release`, or until this process ends, however it ends.

    `excludes` is False on a file system without locks: two writers at once are then up to the user.

    Raises:
        BlockingIOError: another process holds the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lock"
        self.excludes = True
        while True:
            # A file, not the folder itself: on NFS an exclusive lock needs a descriptor that can write.
            self._descriptor: int | None = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._descriptor)
                raise
            except OSError:
                self.excludes = False
            if os.fstat(self._descriptor).st_nlink:
                return
            os.close(self._descriptor)  # its last owner removed the file between our open and our lock

    @property
    def is_held(self) -> bool:
        """Whether `release` has not been called."""
        return self._descriptor is not None

    def release(self) -> None:
        """Let other processes in; the second call does nothing."""
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None
