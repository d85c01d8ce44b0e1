"""Writes a shard folder: documents go in one after another, and the manifest comes out last.

Holds one document in memory, whatever the corpus. Finished shards survive an interruption: the list of them grows line
by line in `unfinished.jsonl`, and the next writer continues after the last one and ends with the same bytes.
"""

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from minimind.data.array_file import ArrayFile, check_array_file
from minimind.data.manifest import MANIFEST_NAME, Manifest, ShardError, ShardInfo, TokenizerInfo
from minimind.files import FolderLock, fsync_folder, hash_file, replace_file

UNFINISHED_NAME = "unfinished.jsonl"
DEFAULT_SHARD_TOKENS = 1 << 26


class ShardWriter:
    """Writes documents into `folder`, in shards of about `shard_tokens` tokens (a longer document gets its own shard).

    Use it as a context manager: leaving it closes it, leaving it by an exception suspends it. With `resume`, an
    interrupted folder is continued (from its first `keep_shards` shards): `num_documents` then says how many documents
    are already in it, and the caller gives those that follow. Raises `ShardError` for a finished folder, for an
    interrupted one without `resume` or made with other settings, for a folder that another process writes, and whenever
    the disk refuses.
    """

    def __init__(
        self,
        folder: Path,
        *,
        vocab_size: int,
        eos_token_id: int,
        tokenizer_file: Path,
        shard_tokens: int = DEFAULT_SHARD_TOKENS,
        resume: bool = False,
        keep_shards: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.shards: list[ShardInfo] = []
        self.shard_tokens = shard_tokens
        self._tokens: ArrayFile | None = None
        self._starts: ArrayFile | None = None
        self._bytes = 0
        self._lock: FolderLock | None = None
        self._started = False
        if shard_tokens < 1:
            raise ShardError(f"shard_tokens is {shard_tokens}; it must be at least 1")
        with self._disk_errors():
            tokenizer_file = Path(tokenizer_file)
            if not tokenizer_file.is_file():
                raise ShardError(f"tokenizer file {tokenizer_file} does not exist")
            dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
            tokenizer = TokenizerInfo(tokenizer_file.name, hash_file(tokenizer_file))
            # The manifest of an empty folder: its checks are the checks of these arguments.
            self._empty = Manifest(dtype, vocab_size, eos_token_id, tokenizer, 0, 0, 0, ())
            self._eos = np.array([eos_token_id], dtype=dtype)
            self._made_folder = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock = FolderLock(self.folder)
            except BlockingIOError:
                raise ShardError(f"{self.folder} is being written by another process") from None
            try:
                self._start(tokenizer_file, resume, keep_shards)
            except ShardError:
                self._unlock()
                raise

    @property
    def num_documents(self) -> int:
        """Documents in the folder, those of the shard being written included."""
        return sum(shard.documents for shard in self.shards) + (self._starts.length if self._starts else 0)

    @property
    def num_tokens(self) -> int:
        """Tokens in the folder, end tokens and the shard being written included."""
        return sum(shard.tokens for shard in self.shards) + (self._tokens.length if self._tokens else 0)

    def add_document(self, tokens: np.ndarray, num_bytes: int) -> None:
        """Append one document of `num_bytes` UTF-8 bytes of text: `tokens` (1-D, integer) and the end token."""
        if self._lock is None:
            raise ValueError(f"the writer of {self.folder} is closed")
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
            raise ShardError(f"document {self.num_documents} is not a non-empty 1-D array of token ids")
        vocab_size = self._empty.vocab_size
        for token in (int(tokens.min()), int(tokens.max())):
            if not 0 <= token < vocab_size:
                raise ShardError(f"document {self.num_documents} has token id {token}; the vocabulary has {vocab_size}")
        with self._disk_errors():
            if self._tokens is not None and self._tokens.length + tokens.size + 1 > self.shard_tokens:
                self._finish_shard()
            if self._tokens is None or self._starts is None:
                token_path, starts_path = shard_paths(self.folder, len(self.shards))
                self._tokens = ArrayFile(token_path, self._empty.dtype)
                self._starts = ArrayFile(starts_path, "int64")
            self._starts.append(np.array([self._tokens.length]))
            self._tokens.append(tokens)
            self._tokens.append(self._eos)
            self._bytes += num_bytes

    def close(self) -> Manifest:
        """Finish the last shard and write the manifest: from here on the folder is complete."""
        if self._lock is None:
            raise ValueError(f"the writer of {self.folder} is closed")
        with self._disk_errors():
            if self._tokens is not None:
                self._finish_shard()
            manifest = dataclasses.replace(
                self._empty,
                total_tokens=self.num_tokens,
                total_documents=self.num_documents,
                total_bytes=sum(shard.bytes for shard in self.shards),
                shards=tuple(self.shards),
            )
            manifest.save(self.folder)
            (self.folder / UNFINISHED_NAME).unlink()
            fsync_folder(self.folder)
            self._unlock()
        return manifest

    def suspend(self) -> None:
        """Drop the shard being written and keep the finished ones for a later `resume`; with none, leave nothing."""
        self._stop(keep_shards=True)

    def discard(self) -> None:
        """Remove everything that this writer, and the interrupted one it continued, wrote."""
        self._stop(keep_shards=False)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None and self._lock is not None:
            self.close()
        else:
            self.suspend()

    def _start(self, tokenizer_file: Path, resume: bool, keep_shards: int | None) -> None:
        if (self.folder / MANIFEST_NAME).exists():
            raise ShardError(f"{self.folder} already holds finished shards: delete it or choose another folder")
        settings = {"shard_tokens": self.shard_tokens, **self._empty.to_dict()}
        unfinished = self.folder / UNFINISHED_NAME
        interrupted = unfinished.exists()
        if interrupted and not resume:
            raise ShardError(f"{self.folder} holds an interrupted preparation: continue it or delete it")
        copy = self.folder / tokenizer_file.name
        self._own_tokenizer = interrupted or not copy.exists()
        if interrupted:
            self.shards = _read_unfinished(unfinished, settings)[:keep_shards]
        elif any(self.folder.glob("shard_*.npy")):
            raise ShardError(f"{self.folder} holds shards of unknown origin (no {MANIFEST_NAME}): delete it first")
        self._started = True
        self._remove_leftovers()
        if not copy.exists() or hash_file(copy) != self._empty.tokenizer.sha256:
            replace_file(copy, tokenizer_file.read_bytes())
        lines = [settings, *(dataclasses.asdict(shard) for shard in self.shards)]
        replace_file(unfinished, "".join(json.dumps(line) + "\n" for line in lines))

    def _finish_shard(self) -> None:
        assert self._tokens is not None and self._starts is not None
        shard = ShardInfo(
            file=self._tokens.path.name,
            documents_file=self._starts.path.name,
            tokens=self._tokens.length,
            documents=self._starts.length,
            bytes=self._bytes,
            sha256=self._tokens.finish(),
            documents_sha256=self._starts.finish(),
        )
        fsync_folder(self.folder)
        with open(self.folder / UNFINISHED_NAME, "a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(shard)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.shards.append(shard)
        self._tokens = self._starts = None
        self._bytes = 0

    def _stop(self, keep_shards: bool) -> None:
        for file in (self._tokens, self._starts):
            if file is not None:
                file.discard()
        self._tokens = self._starts = None
        # Before the start has read which shards are finished, none may be taken for a leftover.
        if self._lock is not None and self._started:
            if not keep_shards:
                self.shards = []
            with contextlib.suppress(OSError):
                self._remove_leftovers()
                if not self.shards:
                    self._remove_start()
        self._unlock()

    def _remove_leftovers(self) -> None:
        """Remove temporary files of a killed writer, and a shard that was whole but not yet in the list."""
        listed = {name for shard in self.shards for name in (shard.file, shard.documents_file)}
        for path in [*self.folder.glob(".shard_*.tmp"), *self.folder.glob("shard_*.npy")]:
            if path.name not in listed:
                path.unlink()

    def _remove_start(self) -> None:
        if self._own_tokenizer:
            (self.folder / self._empty.tokenizer.file).unlink(missing_ok=True)
        (self.folder / UNFINISHED_NAME).unlink(missing_ok=True)
        self._unlock()  # its file is in the folder
        if self._made_folder:
            self.folder.rmdir()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @contextlib.contextmanager
    def _disk_errors(self) -> Any:
        """A full or read-only disk is one clear line, and the writer is suspended."""
        try:
            yield
        except OSError as error:
            self.suspend()
            raise ShardError(f"cannot write {error.filename or self.folder}: {error.strerror}") from error


def shard_paths(folder: Path, index: int) -> tuple[Path, Path]:
    """The token file and the document file of shard `index`."""
    return folder / f"shard_{index:05d}.npy", folder / f"shard_{index:05d}.docs.npy"


def _read_unfinished(path: Path, settings: dict[str, Any]) -> list[ShardInfo]:
    """The finished shards of an interrupted folder. A torn last line belongs to a shard that is written again."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        before, shards = lines[0], [ShardInfo(**line) for line in lines[1:]]
        changed = {name for name, value in settings.items() if before.get(name) != value}
    except (ValueError, TypeError, IndexError, AttributeError):
        raise ShardError(f"{path} is damaged: delete the folder and prepare again") from None
    for name in sorted(changed):
        was, now = before.get(name), settings[name]
        raise ShardError(f"{path.parent} was begun with {name} {was}, now it is {now}: same settings, or delete it")
    for shard in shards:
        check_array_file(path.parent / shard.file, settings["dtype"], shard.tokens)
        check_array_file(path.parent / shard.documents_file, "int64", shard.documents)
    return shards
