"""Reads prepared corpora: any span of the token stream.

A corpus is a folder with `train/` and `val/`, each a complete shard folder (see `manifest.py` and `shard_writer.py`).
Files are mapped when a span first touches them, and stay mapped, as many as the limit on open files allows. Imports no
torch.
"""

import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from minimind.cache import cache_bytes
from minimind.data.array_file import HEADER_BYTES, check_array_file, map_array_file
from minimind.data.chat_template import TEMPLATE_NAME
from minimind.data.manifest import MANIFEST_NAME, Manifest, ShardError, ShardInfo
from minimind.data.shard_cache import ORIGIN_NAME, fetch_shard, localise
from minimind.files import hash_file, raise_open_files
from minimind.remote import join_url, list_files, url_of
from minimind.units import format_bytes

SPLITS = ("train", "val")
PARTIAL_NAME = ".partial"
"""Where a corpus lies in its folder until it is complete."""
CORPUS_NAME = "corpus.json"
"""What a corpus was made from: the last file that is moved into place."""
BAD_DOCUMENTS_NAME = "bad_documents.txt"
_MOST_MAPS = 1 << 15
"""Linux lets a process map 65,530 areas."""
_VERIFY_CHUNK = 1 << 20


class ShardReader:
    """The token stream of one finished shard folder. Raises `ShardError` for a file that is missing or has another size
    or type than the manifest says: at once, or with `check=False` when it is first read, as `check_files` can be shared
    by many processes (contents are checked by `verify`). `parts`: of a corpus that grew, only its first so many."""

    def __init__(self, folder: Path, *, check: bool = True, parts: int | None = None) -> None:
        url = url_of(folder)
        self.folder = Path(folder) if url is None else localise(url, SPLITS, CORPUS_NAME)
        self.manifest = Manifest.load(self.folder)
        if parts is not None:
            self.manifest = self.manifest.first_parts(parts)
        self.dtype = np.dtype(self.manifest.dtype)
        origin = self.folder / ORIGIN_NAME
        self.origin = origin.read_text(encoding="utf-8") if origin.exists() else None
        """Where the shards are, if that is elsewhere: `folder` has the manifest alone."""
        if check:
            self.check_files()
        # Stream offset of the first token of each shard, and of the end: (num_shards + 1,)
        self._offsets = np.cumsum([0, *(shard.tokens for shard in self.manifest.shards)], dtype=np.int64)
        # An open map holds a descriptor, and half of them are left to others; lru_cache is safe between threads.
        most = max(64, min(_MOST_MAPS, raise_open_files() // 2))
        if self.origin is not None:  # a copy that was deleted to make room takes its room until it is no longer mapped
            largest = max((shard.tokens for shard in self.manifest.shards), default=1) * self.dtype.itemsize
            most = min(most, max(2, cache_bytes() // largest))
        self._map_file = functools.lru_cache(maxsize=most)(self.open_file)

    def check_files(self, rank: int = 0, world_size: int = 1, *, lists: bool = True) -> None:
        """Compare the files with the manifest by size and header, each process every `world_size`-th shard.

        Args:
            lists: also look for every name, in one listing of the folder; one process of a host is enough.
        """
        if self.origin is not None:
            if lists:
                self._check_remote(self.origin)
            return
        if lists and world_size > 1:
            there = set(os.listdir(self.folder))
            for name in [name for shard in self.manifest.shards for name in shard.files if name not in there]:
                raise ShardError(f"{self.folder / name} is missing")
        for shard in self.manifest.shards[rank::world_size]:
            for name, dtype, length in shard.arrays(self.manifest.dtype):
                check_array_file(self.folder / name, dtype, length)

    def _check_remote(self, origin: str) -> None:
        there = list_files(origin)
        total = 0
        for shard in self.manifest.shards:
            for name, dtype, length in shard.arrays(self.manifest.dtype):
                total += (size := HEADER_BYTES + length * np.dtype(dtype).itemsize)
                if (found := there.get(name, -1)) not in (size, None):
                    state = f"has {found:,} bytes, not {size:,}" if name in there else "is missing"
                    raise ShardError(f"{join_url(origin, name)} {state}")
        if total > cache_bytes():
            print(
                f"note: {origin} takes {format_bytes(total)}, more than the cache of {format_bytes(cache_bytes())}: "
                "shards are fetched again and again (MINIMIND_CACHE_SIZE raises it)",
                file=sys.stderr,
            )

    @property
    def num_tokens(self) -> int:
        return self.manifest.total_tokens

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over everything that decides the samples: equal fingerprints, equal tokens, documents and targets."""
        return fingerprint_of(self.manifest)

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) of the stream, copied: (length,) of the shards' dtype."""
        return self._read(start, length, 0)

    def read_targets(self, start: int, length: int) -> np.ndarray:
        """Which of these tokens are trained, as `minimind.data.manifest` has it: (length,) uint8. Of conversations."""
        return self._read(start, length, 2)

    def document_starts(self, start: int, length: int) -> np.ndarray:
        """Offsets inside the span [start, start + length) at which a document begins: int64, increasing."""
        found = [np.empty(0, dtype=np.int64)]
        for shard, low, high, offset in self._pieces(start, length):
            starts = self._map_file(shard, 1)
            first, last = np.searchsorted(starts, (low, high))
            found.append(starts[first:last] - low + offset)
        return np.concatenate(found)

    def _read(self, start: int, length: int, kind: int) -> np.ndarray:
        pieces = [self._map_file(shard, kind)[low:high] for shard, low, high, _ in self._pieces(start, length)]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=self.dtype)

    def _pieces(self, start: int, length: int) -> list[tuple[int, int, int, int]]:
        """[(shard, low, high, offset)]: tokens [low, high) of a shard stand at `offset` of the span."""
        end = start + length
        if start < 0 or length < 0 or end > self.num_tokens:
            raise IndexError(f"tokens [{start}, {end}) of {self.folder}, which has {self.num_tokens}")
        pieces = []
        shard = int(np.searchsorted(self._offsets, start, side="right")) - 1
        while start < end:
            first, last = int(self._offsets[shard]), int(self._offsets[shard + 1])
            high = min(end, last)
            pieces.append((shard, start - first, high - first, length - (end - start)))
            start, shard = high, shard + 1
        return pieces

    def open_file(self, shard: int, kind: int = 0) -> np.ndarray:
        """An array of one shard, mapped read-only: its tokens (kind 0), the offsets at which its documents begin (1),
        or the targets of conversations (2)."""
        _, dtype, length = self.manifest.shards[shard].arrays(self.manifest.dtype)[kind]
        return map_array_file(self.find_file(shard, kind), dtype, length)

    def find_file(self, shard: int, kind: int) -> Path:
        """The file of an array of one shard (see `open_file`), fetched if it is elsewhere."""
        info = self.manifest.shards[shard]
        name, dtype, length = info.arrays(self.manifest.dtype)[kind]
        if self.origin is None:
            return self.folder / name
        sha256 = (info.sha256, info.documents_sha256, info.targets_sha256)[kind]
        size = HEADER_BYTES + length * np.dtype(dtype).itemsize
        return fetch_shard(join_url(self.origin, name), sha256 or "", size)


def find_split(folder: Path, split: str) -> Path | None:
    """The shard folder of `split` ("train" or "val") under a corpus folder, or None when it has none.

    `folder` may be a shard folder itself: it is then the split it is named after, or "train" under any other name.
    Raises `ShardError` when the corpus does not exist or its preparation was interrupted.
    """
    url = url_of(folder)
    folder = Path(folder) if url is None else localise(url, SPLITS, CORPUS_NAME)
    if not folder.is_dir():
        problem = "is a file: give the folder of a corpus" if folder.exists() else "does not exist"
        raise ShardError(f"shard folder {folder} {problem}; python -m data_prep.tokenize_corpus makes one")
    if (folder / MANIFEST_NAME).exists():
        return folder if split == (folder.name if folder.name in SPLITS else "train") else None
    partial, is_any = folder / PARTIAL_NAME, any((folder / name / MANIFEST_NAME).exists() for name in SPLITS)
    if (partial / CORPUS_NAME).exists() or (partial.exists() and not is_any):
        raise ShardError(f"the preparation of {folder} is not finished: run data_prep.tokenize_corpus again")
    if not is_any:
        raise ShardError(f"{folder} holds no finished shards: neither {MANIFEST_NAME} nor train/{MANIFEST_NAME}")
    return folder / split if (folder / split / MANIFEST_NAME).exists() else None


def fingerprint_of(manifest: Manifest) -> str:
    """The fingerprint of a shard folder with this manifest."""
    parts = [[shard.tokens, shard.sha256, shard.documents_sha256] for shard in manifest.shards]
    parts += [[shard.targets_sha256] for shard in manifest.shards if shard.targets_sha256 is not None]
    return hashlib.sha256(json.dumps([manifest.dtype, parts]).encode()).hexdigest()


def find_parts(manifest: Manifest, fingerprints: Sequence[str]) -> int | None:
    """How many parts a corpus had when its fingerprint was one of these; None if it never was, or is now."""
    counts = range(len(manifest.parts or ()) - 1, 0, -1)
    return next((count for count in counts if fingerprint_of(manifest.first_parts(count)) in fingerprints), None)


def open_split(folder: Path, split: str, *, check: bool = True, parts: int | None = None) -> ShardReader:
    """The reader of a corpus folder's `split`, or of a shard folder given itself (see `find_split`); `check` and
    `parts` as of `ShardReader`."""
    found = find_split(folder, split)
    if found is None:
        raise ShardError(
            f"{folder} has no {split} split; use another folder, or prepare it with --val-fraction above 0"
        )
    return ShardReader(found, check=check, parts=parts)


def verify(folder: Path, on_shard: Callable[[], object] | None = None) -> Manifest:
    """Read one shard folder whole: every hash, every token id, every document. Calls `on_shard` after each shard.

    Constant memory. Raises `ShardError` naming the file on the first difference from the manifest.
    """
    reader = ShardReader(folder)
    folder = reader.folder
    manifest = reader.manifest
    _check_hash(folder / manifest.tokenizer.file, manifest.tokenizer.sha256)
    if manifest.chat_template_sha256 is not None:
        _check_hash(folder / TEMPLATE_NAME, manifest.chat_template_sha256)
    for index, shard in enumerate(manifest.shards):
        _check_hash(reader.find_file(index, 0), shard.sha256)
        _check_hash(reader.find_file(index, 1), shard.documents_sha256)
        if shard.targets_file is not None and shard.targets_sha256 is not None:
            _check_hash(reader.find_file(index, 2), shard.targets_sha256)
        _check_contents(folder, manifest, shard, reader.open_file(index), reader.open_file(index, 1))
        if on_shard is not None:
            on_shard()
    return manifest


def _check_contents(folder: Path, manifest: Manifest, shard: ShardInfo, tokens: np.ndarray, starts: np.ndarray) -> None:
    for low in range(0, shard.tokens, _VERIFY_CHUNK):
        highest = int(tokens[low : low + _VERIFY_CHUNK].max())
        if highest >= manifest.vocab_size:
            raise ShardError(
                f"{folder / shard.file} has token id {highest}; the vocabulary ends at {manifest.vocab_size}"
            )
    path = folder / shard.documents_file
    if starts[0] != 0:
        raise ShardError(f"{path}: the first document begins at {starts[0]}, not at 0")
    for low in range(0, shard.documents, _VERIFY_CHUNK):
        # One start more than the chunk, so that no neighbours are left uncompared; the shard's end closes the last.
        bounds = starts[low : low + _VERIFY_CHUNK + 1]
        if low + _VERIFY_CHUNK >= shard.documents:
            bounds = np.append(bounds, shard.tokens)
        if np.any(bounds[1:] <= bounds[:-1]) or bounds[-1] > shard.tokens:
            raise ShardError(
                f"{path}: the document starts do not increase inside the {shard.tokens} tokens of the shard"
            )
        unended = np.flatnonzero(tokens[bounds[1:] - 1] != manifest.eos_token_id)
        if unended.size:
            raise ShardError(
                f"{path}: document {low + int(unended[0])} does not end with token {manifest.eos_token_id}"
            )


def _check_hash(path: Path, expected: str) -> None:
    try:
        found = hash_file(path)
    except OSError as error:
        raise ShardError(f"cannot read {path}: {error.strerror}") from None
    if found != expected:
        raise ShardError(f"{path} is damaged: its sha256 is {found}, the manifest says {expected}")
