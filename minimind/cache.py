"""Where copies of what lies elsewhere are kept on this machine, and how many bytes of it."""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from minimind.units import parse_size


def cache_folder() -> Path:
    """Where copies of remote files lie: $MINIMIND_CACHE, or ~/.cache/minimind."""
    return Path(os.environ.get("MINIMIND_CACHE") or Path.home() / ".cache" / "minimind")


def cache_bytes() -> int:
    """How many bytes of shards are kept there: $MINIMIND_CACHE_SIZE, or 50 GB."""
    return parse_size(os.environ.get("MINIMIND_CACHE_SIZE") or "50GB", "MINIMIND_CACHE_SIZE")


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """One process of this machine in `folder`: the ranks that want the same files fetch them once."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def name_of(url: str) -> str:
    """A file name that stands for a URL."""
    return hashlib.sha256(url.encode()).hexdigest()[:24]
