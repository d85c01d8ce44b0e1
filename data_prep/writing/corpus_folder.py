"""The folder of a prepared corpus while it is made: everything lies in `.partial` until it is whole.

Decides between beginning, continuing, refusing, and having nothing to do, and moves the finished parts into place.
Knows nothing of documents or tokens.
"""

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from data_prep.reading.sources import Source
from minimind.data.manifest import MANIFEST_NAME
from minimind.data.shards import SPLITS
from minimind.errors import UserError
from minimind.files import fsync_folder, replace_file

PARTIAL_NAME = ".partial"
STATE_NAME = "state.json"
CORPUS_NAME = "corpus.json"
BAD_DOCUMENTS_NAME = "bad_documents.txt"


class CorpusFolder:
    """Holds the folder against other processes until `close`.

    `is_finished`: the same corpus is already there, nothing is to be done. Else `partial` is the folder to work in, and
    `first_chunks` says for each split from which chunk on documents are missing.

    Raises:
        UserError: another corpus is there (finished, or begun with other inputs or flags), or the disk refuses.
    """

    def __init__(self, output: Path, settings: dict[str, Any], sources: list[Source], overwrite: bool) -> None:
        self.output = output
        self.partial = output / PARTIAL_NAME
        self.first_chunks = dict.fromkeys(SPLITS, 0)
        self.is_finished = False
        self._settings = settings
        self._inputs = [{"name": source.name, "bytes": source.size} for source in sources]
        # Times tell a file that was changed without changing its size; they stay out of the corpus itself.
        self._modified = [source.modified_ns for source in sources]
        self._state = {"settings": settings, "inputs": self._inputs, "modified": self._modified}
        self._made_output = not output.exists()
        self._descriptor = self._lock()
        try:
            self._enter(overwrite)
        except BaseException:
            self.close()
            raise

    def save_progress(self, split: str, first_chunk: int) -> None:
        """Note that every document of `split` before chunk `first_chunk` is in finished shards."""
        self.first_chunks[split] = first_chunk
        self._save_state()

    def publish(self, counts: dict[str, Any]) -> None:
        """Move the finished splits into place; after a crash on the way the next run does the rest."""
        corpus = {"format_version": 1, "settings": self._settings, "inputs": self._inputs, **counts}
        replace_file(self.partial / CORPUS_NAME, json.dumps(corpus, indent=1) + "\n")
        self._publish()

    def close(self) -> None:
        """Let go of the folder; remove what is worth nothing: a preparation without a finished shard."""
        if self._descriptor is None:
            return
        if self.partial.is_dir() and not any(self.partial.glob("*/shard_*.npy")):
            shutil.rmtree(self.partial, ignore_errors=True)
        if self._made_output and not any(self.output.iterdir()):
            self.output.rmdir()
        os.close(self._descriptor)
        self._descriptor = None

    def __enter__(self) -> "CorpusFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> int | None:
        self.output.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.output, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(f"--output {self.output} is being prepared by another process") from None
        except OSError:
            pass  # a file system without locks
        return descriptor

    def _enter(self, overwrite: bool) -> None:
        begun = _read_json(self.partial / STATE_NAME)
        is_same = begun is not None and all(begun.get(key) == value for key, value in self._state.items())
        is_whole = (self.partial / CORPUS_NAME).exists()
        finished = _read_json(self.output / CORPUS_NAME) if (self.output / "train" / MANIFEST_NAME).exists() else None
        if is_same and is_whole:
            self._publish()
            self.is_finished = True
        elif finished is not None and not overwrite:
            self._check_finished(finished)
            self.is_finished = True
            if is_same:
                shutil.rmtree(self.partial)
        elif finished is None and not is_whole and any((self.output / split).exists() for split in SPLITS):
            raise UserError(
                f"--output {self.output} already holds train/ or val/ of unknown origin: choose another folder"
            )
        elif begun is not None and is_same:
            self.first_chunks = {split: int(begun["first_chunks"][split]) for split in SPLITS}
        elif begun is not None and not overwrite:
            raise UserError(
                f"--output {self.output} was begun with other {self._name_difference(begun)}: run the same command "
                "again to continue it, or give --overwrite to begin anew"
            )
        else:
            if self.partial.exists():
                shutil.rmtree(self.partial)
            self.partial.mkdir()
            self._save_state()

    def _check_finished(self, corpus: dict[str, Any]) -> None:
        written = (self.output / CORPUS_NAME).stat().st_mtime_ns
        is_older = all(modified <= written for modified in self._modified)
        before = {**corpus, "modified": self._modified if is_older else None}
        if difference := self._name_difference(before):
            raise UserError(
                f"--output {self.output} holds a corpus prepared from other {difference}: choose another folder, or "
                "give --overwrite to replace it"
            )

    def _name_difference(self, before: dict[str, Any]) -> str:
        """What differs from an earlier run, in words; "" if nothing does."""
        if before.get("settings") != self._settings:
            old = before.get("settings") or {}
            names = [f"{key} {old.get(key)}" for key, value in self._settings.items() if old.get(key) != value]
            return f"settings ({', '.join(names)})"
        if before.get("inputs") != self._inputs:
            return "inputs"
        return "" if before.get("modified") == self._modified else "contents of the inputs"

    def _save_state(self) -> None:
        replace_file(self.partial / STATE_NAME, json.dumps({**self._state, "first_chunks": self.first_chunks}) + "\n")

    def _publish(self) -> None:
        """Every step can be done again: what has left `.partial` is in its place."""
        corpus = _read_json(self.partial / CORPUS_NAME)
        assert corpus is not None
        parts = {"val": "val" in corpus["splits"], BAD_DOCUMENTS_NAME: corpus["bad_documents"] > 0, "train": True}
        (self.output / CORPUS_NAME).unlink(missing_ok=True)
        for name, is_part in parts.items():
            new, old = self.partial / name, self.output / name
            if old.exists() and (new.exists() or not is_part):
                _remove(self.partial / f"old_{name}")
                os.replace(old, self.partial / f"old_{name}")
            if is_part and new.exists():
                os.replace(new, old)
        fsync_folder(self.output)
        os.replace(self.partial / CORPUS_NAME, self.output / CORPUS_NAME)
        fsync_folder(self.output)
        shutil.rmtree(self.partial)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
