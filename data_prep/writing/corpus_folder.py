"""The folder of a corpus during preparation: everything is in `.partial` until it is complete.

Decides between beginning, continuing, refusing, and having nothing to do, and moves the finished parts into place. What
a corpus was made from is every input's name, size and sha256, compared input by input. The one record of an unfinished
corpus is its journal: the settings, then a line for each finished shard, with the inputs begun since the line before.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.reading.byte_stream import Source, hash_remote, is_url
from data_prep.reading.records import ReadOptions
from data_prep.reading.sources import DATASET
from data_prep.reading.tables import hash_dataset
from data_prep.writing.digests import digests_name
from minimind.data.manifest import MANIFEST_NAME, ShardInfo
from minimind.data.shards import BAD_DOCUMENTS_NAME, CORPUS_NAME, PARTIAL_NAME, SPLITS
from minimind.errors import UserError
from minimind.files import FolderLock, fsync_folder, hash_file, replace_file

JOURNAL_NAME = "journal.jsonl"


class CorpusFolder:
    """Holds the folder against other processes until `close`.

    `is_finished`: the same corpus is already there. Otherwise `partial` is the folder to work in, `sources` what to
    read; each split has its finished `shards`, named from number `first_shards` on, and documents missing from chunk
    `first_chunks` on. Documents with a digest in the files `known_digests` are in the corpus already.

    Raises:
        UserError: another corpus is there (finished, or begun with other inputs or flags), or the disk refuses.
    """

    def __init__(
        self, output: Path, settings: dict[str, Any], sources: list[Source], read: ReadOptions, overwrite: bool
    ) -> None:
        self.output = output
        self.partial = output / PARTIAL_NAME
        self.shards: dict[str, list[ShardInfo]] = {split: [] for split in SPLITS}
        self.first_chunks = dict.fromkeys(SPLITS, 0)
        self.first_shards = dict.fromkeys(SPLITS, 0)
        self.part = 0
        self.known_digests: list[Path] = []
        self.is_finished = False
        self._settings = settings
        self.sources = sources
        self._read = read
        self._identities: dict[str, dict[str, Any]] = {}
        # Inputs of which documents were taken in this run, and those that the journal knows.
        self._num_begun = self._num_noted = 0
        self._is_ours = False
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
        self._num_begun = max(self._num_begun, index + 1)

    def add_shard(self, split: str, shard: ShardInfo, first_chunk: int) -> None:
        """Note a finished shard, and that no document of `split` is missing before chunk `first_chunk`."""
        inputs = [self._identify(source) for source in self.sources[self._num_noted : self._num_begun]]
        line = {"split": split, "first_chunk": first_chunk, "inputs": inputs, "shard": dataclasses.asdict(shard)}
        with open(self.partial / JOURNAL_NAME, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._num_noted += len(inputs)
        self.shards[split].append(shard)

    def publish(self, counts: dict[str, Any], written: Mapping[str, Mapping[tuple[str, str], int]]) -> None:
        """Move the finished splits into place; after a crash on the way the next run does the rest.

        Args:
            written: of each input, by its name, the documents and bytes of each split. Inputs after `limit_reached` are
                not named.
        """
        self._complete(self._describe(counts, written))

    def _describe(self, counts: dict[str, Any], written: Mapping[str, Mapping[tuple[str, str], int]]) -> dict[str, Any]:
        """What goes into `corpus.json` for one preparation."""
        begun = self.sources[: self._num_begun] if counts["limit_reached"] else self.sources
        inputs = []
        for source in begun:
            found = written.get(source.name, {})
            splits = {split: {what: n for (of, what), n in found.items() if of == split} for split in SPLITS}
            documents = sum(n for (_, what), n in found.items() if what == "documents")
            inputs.append({**self._identify(source), "documents": documents, "splits": splits})
        return {"format_version": 2, "settings": dict(self._settings), "inputs": inputs, **counts}

    def _complete(self, corpus: dict[str, Any]) -> None:
        replace_file(self.partial / CORPUS_NAME, json.dumps(corpus, indent=1) + "\n")
        self._publish(corpus)

    def close(self) -> None:
        """Let go of the folder; remove what is worth nothing: a preparation without a finished shard."""
        if self._is_ours and not any(self.shards.values()):
            shutil.rmtree(self.partial, ignore_errors=True)
        self._lock.release()
        if self._made_output:
            with contextlib.suppress(OSError):  # there are files in it
                self.output.rmdir()

    def _enter(self, overwrite: bool) -> None:
        complete = read_object(self.partial / CORPUS_NAME)
        finished = self._read_finished()
        difference = self._find_difference(complete) if complete is not None else ""
        if complete is not None and not difference:
            self._publish(complete)
            self.is_finished = True
            return
        if finished is not None and not overwrite:
            if difference := self._find_difference(finished):
                raise UserError(
                    f"--output {self.output} holds a corpus prepared from other {difference}: choose another folder, "
                    "or give --overwrite to replace it, or --append to add new inputs to it"
                )
            self.is_finished = True
            with contextlib.suppress(ValueError):
                if "appended_to" in self._read_journal()[0].get("settings", {}):
                    return  # a part that is being added, by another command
            shutil.rmtree(self.partial, ignore_errors=True)
            return
        if finished is None and complete is None and any((self.output / split).exists() for split in SPLITS):
            raise UserError(
                f"--output {self.output} already holds train/ or val/ of unknown origin: choose another folder"
            )
        difference = difference or self._continue()
        if difference and not overwrite:
            raise UserError(
                f"--output {self.output} was begun with other {difference}: run the same command again to continue it, "
                "or give --overwrite to begin anew"
            )
        self._begin()

    def _read_finished(self) -> dict[str, Any] | None:
        """What the finished corpus in the folder was made from; None: there is none."""
        return read_object(self.output / CORPUS_NAME) if (self.output / "train" / MANIFEST_NAME).exists() else None

    def _begin(self) -> None:
        if not any(self.shards.values()):
            if self.partial.exists():
                shutil.rmtree(self.partial)
            self.partial.mkdir()
            replace_file(self.partial / JOURNAL_NAME, json.dumps({"settings": self._settings}) + "\n")
        self._is_ours = True

    def _continue(self) -> str:
        """Take up the finished shards of an interrupted run as far as their inputs are the same; in words what differs
        if there are some and none can be used."""
        path = self.partial / JOURNAL_NAME
        try:
            begun, *entries = self._read_journal()
        except ValueError:
            return f"contents of {path}"
        difference = self._find_changed_settings(begun) if entries else ""
        kept: list[str] = []
        for entry in [] if difference else entries:
            shard, folder = ShardInfo(**entry["shard"]), self.partial / entry["split"]
            lost = [name for name in shard.files if not (folder / name).exists()]
            difference = f"contents of {folder / lost[0]}, which is gone" if lost else ""
            if difference := difference or self._find_changed_input(entry["inputs"], self._num_noted):
                break
            self._num_noted += len(entry["inputs"])
            self.shards[entry["split"]].append(shard)
            self.first_chunks[entry["split"]] = entry["first_chunk"]
            kept.append(shard.file)
        if difference and not kept:
            return difference
        if difference:
            number = len(kept)
            print(f"note: other {difference}: {number} of {len(entries)} finished shards are kept", file=sys.stderr)
        if kept:
            lines = [begun, *entries[: len(kept)]]
            replace_file(path, "".join(json.dumps(line) + "\n" for line in lines))
            for split, shards in self.shards.items():
                files = {name for shard in shards for name in shard.files}
                for leftover in (self.partial / split).glob("*"):
                    if leftover.name not in files:
                        leftover.unlink()
        return ""

    def _read_journal(self) -> list[dict[str, Any]]:
        """What the preparation in `.partial` began with, and a line for each shard. Raises `ValueError`."""
        path = self.partial / JOURNAL_NAME
        # The last line may be torn; its shard is made again.
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines or ["{}"]]

    def _find_difference(self, corpus: dict[str, Any]) -> str:
        """What a finished corpus was made from that is not given now, in words; "" if it is the same."""
        inputs = corpus.get("inputs", [])
        if difference := self._find_changed_settings(corpus) or self._find_changed_input(inputs):
            return difference
        if len(inputs) < len(self.sources) and not corpus["limit_reached"]:
            return f"inputs ({self.sources[len(inputs)].name} is new)"
        return ""

    def _find_changed_settings(self, before: dict[str, Any]) -> str:
        old = before.get("settings") or {}
        names = [f"{key} {old.get(key)}" for key, value in self._settings.items() if old.get(key) != value]
        if not names and before.get("format_version", 2) != 2:
            return "settings (by an older version)"
        return f"settings ({', '.join(names)})" if names else ""

    def _find_changed_input(self, before: list[dict[str, Any]], first: int = 0) -> str:
        """What is different about inputs that were the ones from number `first` on, in words; "" if nothing is."""
        now = [(source.name, source.is_val) for source in self.sources]
        then = [(old["name"], old["is_val"]) for old in before]
        for index, old in enumerate(before, first):
            if index >= len(now) or (now[index] in then and then[index - first] not in now):
                return f"inputs ({old['name']} is no longer given)"
            source = self.sources[index]
            if now[index] != then[index - first]:
                is_new = now[index] not in then and then[index - first] in now
                what = "is new" if is_new else f"in place of {old['name']}"
                return f"inputs ({source.name} {what})"
            # The size first: hashing takes a while.
            if old["bytes"] != source.size or old["sha256"] != self._identify(source)["sha256"]:
                return f"contents of {source.name}"
        return ""

    def _identify(self, source: Source) -> dict[str, Any]:
        if source.name not in self._identities:
            if is_url(source.path):
                sha256 = hash_remote(source.path)
            elif source.format == DATASET:
                sha256 = hash_dataset(source.name, self._read)
            else:
                sha256 = hash_file(source.path)
            identity = {"name": source.name, "is_val": source.is_val, "bytes": source.size, "sha256": sha256}
            self._identities[source.name] = identity
        return self._identities[source.name]

    def _publish(self, corpus: dict[str, Any]) -> None:
        """Every step can be done again: what has left `.partial` is in its place."""
        if "appended" in corpus:
            self._publish_part(corpus["appended"])
        else:
            self._publish_whole(corpus)
        fsync_folder(self.output)
        os.replace(self.partial / CORPUS_NAME, self.output / CORPUS_NAME)
        fsync_folder(self.output)
        shutil.rmtree(self.partial)

    def _publish_whole(self, corpus: dict[str, Any]) -> None:
        parts = {"val": "val" in corpus["splits"], BAD_DOCUMENTS_NAME: corpus["bad_documents"] > 0, "train": True}
        parts |= {path.name: False for path in self.output.glob("digests_*.bin")}
        parts |= {digests_name(0): True} if corpus["settings"].get("dedup") else {}
        (self.output / CORPUS_NAME).unlink(missing_ok=True)
        for name, is_part in parts.items():
            new, old = self.partial / name, self.output / name
            if old.exists() and (new.exists() or not is_part):
                os.replace(old, self.partial / f"old_{name}")
            if is_part and new.exists():
                os.replace(new, old)

    def _publish_part(self, appended: list[dict[str, Any]]) -> None:
        for split in SPLITS:
            new, old = self.partial / split, self.output / split
            if not new.exists():
                continue
            old.mkdir(exist_ok=True)
            # The manifest last: until then a reader finds the corpus as it was.
            for file in sorted(new.iterdir(), key=lambda file: file.name == MANIFEST_NAME):
                if file.name == MANIFEST_NAME:
                    fsync_folder(old)
                os.replace(file, old / file.name)
            fsync_folder(old)
        is_bad = any(part["bad_documents"] for part in appended)
        for name in [digests_name(len(appended)), *([BAD_DOCUMENTS_NAME] if is_bad else [])]:
            if (self.partial / name).exists():
                os.replace(self.partial / name, self.output / name)


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is none."""
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else None
    return None
