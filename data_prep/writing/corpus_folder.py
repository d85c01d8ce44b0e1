"""The folder of a corpus during preparation: everything is in `.partial` until it is complete.

Decides between beginning, continuing, refusing, and having nothing to do, and moves the finished parts into place. What
a corpus was made from is every input's name, size and sha256, compared input by input.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from data_prep.reading.byte_stream import Source
from data_prep.reading.records import ReadOptions
from data_prep.reading.sources import DATASET
from data_prep.reading.tables import identify_dataset
from minimind.data.manifest import MANIFEST_NAME
from minimind.data.shards import SPLITS
from minimind.errors import UserError
from minimind.files import FolderLock, fsync_folder, hash_file, replace_file

PARTIAL_NAME = ".partial"
STATE_NAME = "state.json"
CORPUS_NAME = "corpus.json"
BAD_DOCUMENTS_NAME = "bad_documents.txt"


class CorpusFolder:
    """Holds the folder against other processes until `close`.

    `is_finished`: the same corpus is already there. Otherwise `partial` is the folder to work in;
    each split has `num_shards` finished shards, and its documents are missing from chunk `first_chunks` on.

    Raises:
        UserError: another corpus is there (finished, or begun with other inputs or flags), or the disk refuses.
    """

    def __init__(
        self, output: Path, settings: dict[str, Any], sources: list[Source], read: ReadOptions, overwrite: bool
    ) -> None:
        self.output = output
        self.partial = output / PARTIAL_NAME
        self.first_chunks = dict.fromkeys(SPLITS, 0)
        self.num_shards = dict.fromkeys(SPLITS, 0)
        self.is_finished = False
        self._settings = settings
        self._sources = sources
        self._read = read
        self._identities: dict[str, dict[str, Any]] = {}
        # Inputs of which documents were taken, each with the progress saved when it began: shards finished by then hold
        # nothing of it.
        self._begun: list[dict[str, Any]] = []
        self._made_output = not output.exists()
        if output.exists() and not output.is_dir():
            raise UserError(f"--output {output} is a file: give the name of a folder")
        output.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = FolderLock(output)
        except BlockingIOError:
            raise UserError(f"--output {output} is being prepared by another process") from None
        try:
            self._enter(overwrite)
        except BaseException:
            self.close()
            raise

    def begin_input(self, index: int) -> None:
        """Note that the documents that follow are of input number `index`."""
        for source in self._sources[len(self._begun) : index + 1]:
            progress = {"first_chunks": dict(self.first_chunks), "num_shards": dict(self.num_shards)}
            self._begun.append({**self._identify(source), **progress})

    def save_progress(self, split: str, first_chunk: int, num_shards: int) -> None:
        """Note that every document of `split` before chunk `first_chunk` is in `num_shards` finished shards."""
        self.first_chunks[split] = first_chunk
        self.num_shards[split] = num_shards
        self._save_state()

    def publish(self, counts: dict[str, Any], documents: dict[str, int]) -> None:
        """Move the finished splits into place; after a crash on the way the next run does the rest.

        Args:
            documents: how many were read of each input, by its name. Inputs after `limit_reached` are not named.
        """
        if not counts["limit_reached"]:
            self.begin_input(len(self._sources) - 1)
        begun = self._sources[: len(self._begun)]
        inputs = [{**self._identify(source), "documents": documents.get(source.name, 0)} for source in begun]
        corpus = {"format_version": 2, "settings": self._settings, "inputs": inputs, **counts}
        replace_file(self.partial / CORPUS_NAME, json.dumps(corpus, indent=1) + "\n")
        self._publish(corpus)

    def close(self) -> None:
        """Let go of the folder; remove what is worth nothing: a preparation without a finished shard."""
        if not self._lock.is_held:
            return
        if self.partial.is_dir() and not any(self.partial.glob("*/shard_*.npy")):
            shutil.rmtree(self.partial, ignore_errors=True)
        self._lock.release()
        if self._made_output:
            with contextlib.suppress(OSError):  # there are files in it
                self.output.rmdir()

    def __enter__(self) -> "CorpusFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _enter(self, overwrite: bool) -> None:
        begun = _read_json(self.partial / STATE_NAME)
        complete = _read_json(self.partial / CORPUS_NAME)
        finished = _read_json(self.output / CORPUS_NAME) if (self.output / "train" / MANIFEST_NAME).exists() else None
        if complete is not None and not self._find_difference(complete):
            self._publish(complete)
            self.is_finished = True
            return
        if finished is not None and not overwrite:
            if difference := self._find_difference(finished):
                raise UserError(
                    f"--output {self.output} holds a corpus prepared from other {difference}: choose another folder, "
                    "or give --overwrite to replace it"
                )
            self.is_finished = True
            shutil.rmtree(self.partial, ignore_errors=True)
            return
        if finished is None and complete is None and any((self.output / split).exists() for split in SPLITS):
            raise UserError(
                f"--output {self.output} already holds train/ or val/ of unknown origin: choose another folder"
            )
        difference = self._continue(begun) if begun is not None else "nothing"
        if begun is not None and difference and not overwrite:
            raise UserError(
                f"--output {self.output} was begun with other {difference}: run the same command again to continue it, "
                "or give --overwrite to begin anew"
            )
        if difference:
            if self.partial.exists():
                shutil.rmtree(self.partial)
            self.partial.mkdir()
        self._save_state()

    def _continue(self, state: dict[str, Any]) -> str:
        """Take up the progress of an interrupted run as far as its inputs are the same; in words what differs if
        nothing of it can be used."""
        if difference := self._find_changed_settings(state):
            return difference
        common, difference = self._find_changed_input(state["inputs"])
        self._begun = state["inputs"][:common]
        progress = state["inputs"][common] if difference else state
        if difference:
            if not any(progress["num_shards"].values()) or any(self.partial.glob(f"*/{MANIFEST_NAME}")):
                return difference
            kept, written = sum(progress["num_shards"].values()), sum(state["num_shards"].values())
            print(f"note: other {difference}: {kept} of {written} finished shards are kept", file=sys.stderr)
        self.first_chunks, self.num_shards = dict(progress["first_chunks"]), dict(progress["num_shards"])
        return ""

    def _find_difference(self, corpus: dict[str, Any]) -> str:
        """What a finished corpus was made from that is not given now, in words; "" if it is the same."""
        if difference := self._find_changed_settings(corpus):
            return difference
        count, difference = self._find_changed_input(corpus["inputs"])
        if not difference and count < len(self._sources) and not corpus["limit_reached"]:
            difference = f"inputs ({self._sources[count].name} is new)"
        return difference

    def _find_changed_settings(self, before: dict[str, Any]) -> str:
        old = before.get("settings") or {}
        names = [f"{key} {old.get(key)}" for key, value in self._settings.items() if old.get(key) != value]
        if not names and before.get("format_version", 2) != 2:
            return "settings (by an older version)"
        return f"settings ({', '.join(names)})" if names else ""

    def _find_changed_input(self, before: list[dict[str, Any]]) -> tuple[int, str]:
        """(how many inputs are the same at the beginning of both lists, what is different about the next)"""
        for index, old in enumerate(before):
            if index >= len(self._sources):
                return index, f"inputs ({old['name']} is no longer given)"
            source = self._sources[index]
            if (old["name"], old["is_val"]) != (source.name, source.is_val):
                return index, f"inputs ({source.name} in place of {old['name']})"
            # The size first: hashing takes a while.
            if old["bytes"] != source.size or old["sha256"] != self._identify(source)["sha256"]:
                return index, f"contents of {source.name}"
        return len(before), ""

    def _identify(self, source: Source) -> dict[str, Any]:
        if source.name not in self._identities:
            if source.format != DATASET:
                sha256 = hash_file(source.path)
            elif os.path.isdir(source.name):
                files = sorted(path for path in Path(source.name).rglob("*") if path.is_file())
                parts = [[str(path.relative_to(source.name)), hash_file(path)] for path in files]
                sha256 = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
            else:
                sha256 = identify_dataset(source, self._read)
            identity = {"name": source.name, "is_val": source.is_val, "bytes": source.size, "sha256": sha256}
            self._identities[source.name] = identity
        return self._identities[source.name]

    def _save_state(self) -> None:
        progress = {"first_chunks": self.first_chunks, "num_shards": self.num_shards}
        state = {"settings": self._settings, "inputs": self._begun, **progress}
        replace_file(self.partial / STATE_NAME, json.dumps(state) + "\n")

    def _publish(self, corpus: dict[str, Any]) -> None:
        """Every step can be done again: what has left `.partial` is in its place."""
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
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else None
    return None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
