"""Encoded chunks, in order, into the shards of each split, without repeats and without what an interrupted run wrote.

Runs in the one process that writes.
"""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from data_prep.writing.corpus_folder import CorpusFolder
from data_prep.writing.digests import DIGEST_BYTES, DigestSet
from data_prep.writing.encode_chunk import EncodedChunk
from minimind.data.manifest import MANIFEST_NAME, Manifest
from minimind.data.shards import ShardWriter
from minimind.data.tokenizer import Tokenizer
from minimind.errors import UserError


@dataclass(frozen=True)
class Limits:
    """Where a corpus ends although its inputs go on; None is nowhere. The first that is reached counts."""

    documents: int | None
    tokens: int | None
    bytes: int | None


class CorpusWriter:
    """Writes chunks given in the order of the input. A context manager: finished shards survive an exception."""

    def __init__(
        self,
        folder: CorpusFolder,
        splits: tuple[str, ...],
        tokenizer: Tokenizer,
        shard_tokens: int,
        dedup: bool,
        limits: Limits,
    ) -> None:
        self.num_documents = 0
        self.num_bytes = 0
        self.num_repeated = 0
        self.limit_reached = False
        self._limits = limits
        self._folder = folder
        self._seen = DigestSet() if dedup else None
        self._splits: dict[str, _SplitWriter] = {}
        try:
            for split in splits:
                self._splits[split] = _SplitWriter(
                    folder.partial / split, tokenizer, shard_tokens, folder.num_shards[split]
                )
        except BaseException:
            self._suspend()
            raise

    def add_chunk(self, index: int, chunk: EncodedChunk) -> int:
        """Write the documents of chunk number `index` up to the limits, and note the progress when a shard was
        finished; returns how many were written, now or before an interruption."""
        written = self.num_documents
        before = {name: split.num_shards for name, split in self._splits.items()}
        is_new = self._find_new(chunk.digests)
        ends = np.cumsum(chunk.lengths)
        documents = zip(
            is_new.tolist(),
            chunk.is_val.tolist(),
            chunk.sizes.tolist(),
            chunk.lengths.tolist(),
            ends.tolist(),
            strict=True,
        )
        for new, is_val, size, length, end in documents:
            if not new:
                self.num_repeated += 1
                continue
            self._splits["val" if is_val else "train"].add(chunk.tokens[end - length : end], size)
            self.num_documents += 1
            self.num_bytes += size
            if self._is_full():
                self.limit_reached = True
                break
        for name, split in self._splits.items():
            if split.num_shards > before[name]:
                # The documents of the shard now begun may start in this very chunk.
                self._folder.save_progress(name, index, split.num_shards)
        return self.num_documents - written

    def finish(self) -> dict[str, dict[str, int]]:
        """Complete all splits; returns their totals. An empty validation split is left out.

        Raises:
            UserError: there is no document to train on.
        """
        if not self._splits["train"].num_documents:
            raise UserError("the inputs hold no document for the training split: nothing to prepare")
        totals = {}
        for name in reversed(self._splits):
            manifest = self._splits[name].finish()
            if manifest is not None:
                totals[name] = {
                    "documents": manifest.total_documents,
                    "tokens": manifest.total_tokens,
                    "bytes": manifest.total_bytes,
                }
        return totals

    def __enter__(self) -> "CorpusWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._suspend()

    def _suspend(self) -> None:
        for split in self._splits.values():
            split.suspend()

    def _is_full(self) -> bool:
        # After an interruption a split has tokens of later documents already, but never so many that this is true
        # before it was true in an uninterrupted run: that run did not end at the shards which are finished.
        counts = (self.num_documents, sum(split.num_tokens for split in self._splits.values()), self.num_bytes)
        limits = (self._limits.documents, self._limits.tokens, self._limits.bytes)
        return any(limit is not None and count >= limit for count, limit in zip(counts, limits, strict=True))

    def _find_new(self, digests: bytes) -> np.ndarray:
        if self._seen is None:
            return np.ones(len(digests) // DIGEST_BYTES, dtype=bool)
        return self._seen.add(digests)


class _SplitWriter:
    """One split: passes over the documents that it has already."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_tokens: int, num_shards: int) -> None:
        self.num_documents = 0
        self._folder = folder
        # With a manifest the interruption came after this split was complete.
        self._writer: ShardWriter | None = None
        if not (folder / MANIFEST_NAME).exists():
            self._writer = ShardWriter(
                folder,
                vocab_size=tokenizer.vocab_size,
                eos_token_id=tokenizer.eos_token_id,
                tokenizer_file=tokenizer.file,
                shard_tokens=shard_tokens,
                resume=True,
                keep_shards=num_shards,
            )
        self._num_written = self._writer.num_documents if self._writer else Manifest.load(folder).total_documents

    @property
    def num_shards(self) -> int:
        return len(self._writer.shards) if self._writer else 0

    @property
    def num_tokens(self) -> int:
        return self._writer.num_tokens if self._writer else Manifest.load(self._folder).total_tokens

    def add(self, tokens: np.ndarray, num_bytes: int) -> None:
        self.num_documents += 1
        if self.num_documents > self._num_written and self._writer:
            self._writer.add_document(tokens, num_bytes)

    def finish(self) -> Manifest | None:
        if self._writer is None:
            return Manifest.load(self._folder)
        if self._writer.num_documents == 0:
            self._writer.discard()
            return None
        return self._writer.close()

    def suspend(self) -> None:
        if self._writer:
            self._writer.suspend()
