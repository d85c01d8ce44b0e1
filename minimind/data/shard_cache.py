"""Copies of remote shards on this machine: fetched when they are first read, checked, and no more than a limit allows.

A corpus elsewhere has a folder here with its manifests, its tokenizer and a file that says where it is; its token files
lie beside by their sha256, so that what grew or moved is not fetched twice.
"""

import os
from pathlib import Path

from minimind.cache import cache_bytes, cache_folder, name_of, one_at_a_time
from minimind.data.chat_template import TEMPLATE_NAME
from minimind.data.manifest import MANIFEST_NAME, Manifest, ShardError
from minimind.errors import UserError
from minimind.files import disk_errors, replace_file
from minimind.remote import exists, fetch, join_url, read_bytes
from minimind.units import format_bytes

ORIGIN_NAME = ".origin"
"""In the local folder of a remote split: its URL."""


def localise(url: str, splits: tuple[str, ...], corpus_name: str) -> Path:
    """The local folder of a remote corpus, or of one split: its manifests as they are now, and no shards yet.

    Raises:
        UserError: there is no finished corpus, it cannot be read, or the disk refuses.
    """
    folder = cache_folder() / "corpora" / name_of(url) / url.rstrip("/").rpartition("/")[2]
    parts = {folder: url} if exists(join_url(url, MANIFEST_NAME)) else {}
    parts = parts or {folder / split: join_url(url, split) for split in splits}
    found = 0
    with disk_errors(folder):
        for local, remote in parts.items():
            if local != folder and not exists(join_url(remote, MANIFEST_NAME)):
                continue
            local.mkdir(parents=True, exist_ok=True)
            replace_file(local / MANIFEST_NAME, read_bytes(join_url(remote, MANIFEST_NAME)))
            manifest = Manifest.load(local)
            names = {manifest.tokenizer.file: manifest.tokenizer.sha256}
            if manifest.chat_template_sha256 is not None:
                names[TEMPLATE_NAME] = manifest.chat_template_sha256
            for name, sha256 in names.items():
                fetch(join_url(remote, name), local / name, sha256)
            replace_file(local / ORIGIN_NAME, remote)
            found += 1
        if found and folder not in parts and exists(join_url(url, corpus_name)):
            replace_file(folder / corpus_name, read_bytes(join_url(url, corpus_name)))
    if not found:
        raise ShardError(f"{url} holds no finished shards: neither {MANIFEST_NAME} nor train/{MANIFEST_NAME}")
    return folder


def fetch_shard(url: str, sha256: str, size: int) -> Path:
    """The local copy of a shard's file, which counts as used now; the copies that were not for longest make room.

    Args:
        size: of the file, in bytes.

    Raises:
        ShardError: it cannot be fetched, is not what the manifest says, or the cache cannot hold it.
    """
    folder, limit = cache_folder() / "files", cache_bytes()
    path = folder / sha256
    if size > limit:
        raise ShardError(
            f"{url} takes {format_bytes(size)}, more than the cache of {format_bytes(limit)}: raise MINIMIND_CACHE_SIZE"
        )
    try:
        with disk_errors(folder, "; give another place by MINIMIND_CACHE, or less by MINIMIND_CACHE_SIZE"):
            folder.mkdir(parents=True, exist_ok=True)
            with one_at_a_time(folder):
                if not (path.exists() and path.stat().st_size == size):
                    _make_room(folder, limit - size)
                    fetch(url, path, sha256)
                os.utime(path)
    except UserError as error:
        raise ShardError(str(error)) from None
    return path


def _make_room(folder: Path, room: int) -> None:
    """Delete the copies that were not used for longest until the others take no more than `room` bytes, and what a
    killed process had begun. What a process has mapped stays readable for it."""
    for begun in folder.glob(".*.tmp"):
        begun.unlink()
    files = [(file.stat(), file) for file in folder.iterdir() if not file.name.startswith(".")]
    taken = sum(status.st_size for status, _ in files)
    for status, file in sorted(files, key=lambda item: item[0].st_mtime_ns):
        if taken <= room:
            return
        file.unlink()
        taken -= status.st_size
