"""The folder of a finished corpus while a part is added: new shards beside the old ones, which stay as they are.

The part lies in `.partial` until it is complete, and comes in by its shards first and the manifests after them: a
reader finds the corpus as it was or as it is then.
"""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.reading.byte_stream import Source
from data_prep.writing.corpus_folder import CorpusFolder, read_object
from data_prep.writing.digests import digests_name
from data_prep.writing.encode_chunk import CorpusOptions
from minimind.data.manifest import MANIFEST_NAME, Manifest
from minimind.data.shards import BAD_DOCUMENTS_NAME, CORPUS_NAME, SPLITS
from minimind.errors import UserError
from minimind.files import hash_file, replace_file


class GrowingFolder(CorpusFolder):
    """A `CorpusFolder` whose finished corpus takes the inputs that are not yet in it; `is_finished`: all of them are.

    Raises:
        UserError: no finished corpus is there, another tokenizer or template made it, or an input has changed since.
    """

    def __init__(self, output: Path, settings: dict[str, Any], sources: list[Source], options: CorpusOptions) -> None:
        self._options = options
        super().__init__(output, settings, sources, options, overwrite=False)

    def publish(self, counts: dict[str, Any], written: Mapping[str, Mapping[tuple[str, str], int]]) -> None:
        part = self._describe(counts, written)
        part["settings"].pop("appended_to")
        for split in SPLITS:
            old, new = (_load_manifest(folder / split) for folder in (self.output, self.partial))
            if (base := old or new) is None:
                continue
            parts = (0,) * self.part if old is None else old.parts or (len(old.shards),)
            shards = (*(old.shards if old else ()), *(new.shards if new else ()))
            (self.partial / split).mkdir(exist_ok=True)
            base.with_shards(shards, (*parts, len(shards) - sum(parts))).save(self.partial / split)
        before = self.output / BAD_DOCUMENTS_NAME
        if before.exists():
            found = (self.partial / BAD_DOCUMENTS_NAME).read_bytes()
            replace_file(self.partial / BAD_DOCUMENTS_NAME, before.read_bytes() + found)
        self._complete({**self._corpus, "appended": [*self._corpus.get("appended", []), part]})

    def _enter(self, overwrite: bool) -> None:
        complete = read_object(self.partial / CORPUS_NAME)
        if complete is not None and "appended" in complete:
            self._publish(complete)
        finished = self._read_finished()
        if finished is None:
            raise UserError(f"--append: {self.output} holds no finished corpus; without the flag one is prepared there")
        self._corpus = finished
        self.part = 1 + len(finished.get("appended", []))
        old = self._check_same()
        self.first_shards |= {split: len(manifest.shards) for split, manifest in old.items()}
        self._leave_out_known()
        if not self.sources:
            self.is_finished = True
            if complete is not None:
                shutil.rmtree(self.partial, ignore_errors=True)
            return
        self._settings["appended_to"] = hash_file(self.output / CORPUS_NAME)
        if difference := self._continue():
            raise UserError(
                f"--output {self.output} has a part begun with other {difference}: run the same command again to "
                f"continue it, or delete {self.partial} to begin anew"
            )
        self._begin()

    def _check_same(self) -> dict[str, Manifest]:
        """The manifests of the splits, made with what the part will be made with."""
        found = {split: manifest for split in SPLITS if (manifest := _load_manifest(self.output / split)) is not None}
        now = self._settings
        for split, manifest in found.items():
            pairs = {
                "tokenizer": (manifest.tokenizer.sha256, now["tokenizer_sha256"]),
                "end token": (manifest.eos_token_id, now["eos_token_id"]),
                "chat template": (manifest.chat_template_sha256, now.get("chat_template_sha256")),
                "kind of documents": (manifest.kind, self._options.kind),
            }
            for name, (before, here) in pairs.items():
                if before != here:
                    raise UserError(
                        f"--append: the {name} of {self.output / split} is {before}, here it is {here}: give the same, "
                        "or prepare another folder"
                    )
        if not self._options.dedup:
            if self._corpus["settings"].get("dedup"):
                print("note: without --dedup documents that are in the corpus already come in again", file=sys.stderr)
            return found
        self.known_digests = [self.output / digests_name(part) for part in range(self.part)]
        for path in self.known_digests:
            if not path.exists():
                raise UserError(
                    f"--dedup: {path} is missing: that part was prepared without --dedup, or by an older version; "
                    "prepare the corpus anew with --dedup, or append without"
                )
        return found

    def _leave_out_known(self) -> None:
        """Keep the inputs that are not in the corpus. Raises `UserError` for one with other contents than it had."""
        old = [entry for part in (self._corpus, *self._corpus.get("appended", [])) for entry in part["inputs"]]
        names = {entry["name"]: entry for entry in old}
        sizes = {entry["bytes"] for entry in old}
        hashes = {entry["sha256"] for entry in old}
        new = []
        for source in self.sources:
            # Hashing takes a while: another size is another content.
            if source.size in sizes and self._identify(source)["sha256"] in hashes:
                continue
            if source.name in names:
                raise UserError(
                    f"--append: {source.name} has other contents than when it came into {self.output}: give new text "
                    "in new files"
                )
            new.append(source)
        if len(new) < len(self.sources):
            print(f"{len(self.sources) - len(new):,} of {len(self.sources):,} inputs are in the corpus already")
        self.sources = new


def _load_manifest(folder: Path) -> Manifest | None:
    return Manifest.load(folder) if (folder / MANIFEST_NAME).exists() else None
