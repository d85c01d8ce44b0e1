"""Files that are either whole or not there.

Data goes under a temporary name in the same folder, is flushed to the disk, and takes its name in one step. Knows
nothing of what the files mean; errors of the operating system go through unchanged (`OSError`).
"""

import contextlib
import errno
import hashlib
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The repository, or the folder that the package is installed in."""

_CHUNK_BYTES = 1 << 20


def temporary_name(path: str | os.PathLike[str]) -> Path:
    """The name under which this process writes `path` until it is whole: hidden, in the same folder."""
    path = Path(path)
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def replace_file(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `path`: a reader, or a crash at any moment, sees the old file or the new one."""
    path = Path(path)
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync_folder(path.parent)


def fsync_folder(path: str | os.PathLike[str]) -> None:
    """Make the names in a folder durable (new files, renames, removals)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and user-space file systems have no fsync for folders; there is nothing more to do there.
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
