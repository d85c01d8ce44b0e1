"""Encoded chunks, in order, into the shards of each split, without repeats and without what an interrupted run wrote.

Runs in the one process that writes.
"""

import shutil
from collections import Counter

import numpy as np

from data_prep.writing.corpus_folder import CorpusFolder
from data_prep.writing.digests import DigestSet, digests_name
from data_prep.writing.encode_chunk import CorpusOptions, EncodedChunk
from minimind.data.shard_writer import ShardWriter
from minimind.data.tokenizer import Tokenizer
from minimind.errors import UserError


class CorpusWriter:
    """Writes chunks given in the order of the input."""

    def __init__(
        self, folder: CorpusFolder, splits: tuple[str, ...], tokenizer: Tokenizer, options: CorpusOptions
    ) -> None:
        self.num_documents = 0
        self.num_bytes = 0
        self.num_repeated = 0
        self.limit_reached = False
        self._unwritten: list[bytes] = []  # digests of documents beyond the limit
        self._limits = (options.max_documents, options.max_tokens, options.max_bytes)
        self._folder = folder
        self._dtype = np.dtype(tokenizer.typecode)
        self._seen = DigestSet(folder.known_digests) if options.dedup else None
        self._writers = {
            split: ShardWriter(
                folder.partial / split,
                vocab_size=tokenizer.vocab_size,
                eos_token_id=tokenizer.eos_token_id,
                tokenizer_file=tokenizer.file,
                shard_tokens=options.shard_tokens,
                shards=folder.shards[split],
                first_shard=folder.first_shards[split],
                chat_template=options.template_text(tokenizer),
                kind=options.kind,
            )
            for split in splits
        }
        # Documents of each split that are in the shards of an interrupted run, to be passed over.
        self._num_written = {split: writer.num_documents for split, writer in self._writers.items()}
        self._num_met: Counter[str] = Counter()

    def add_chunk(self, index: int, chunk: EncodedChunk) -> Counter[tuple[str, str]]:
        """Write the documents of chunk number `index` up to the limits, and note the shards that are finished; returns
        what was written, now or before an interruption: documents and bytes of each split, as ("train", "bytes")."""
        written: Counter[tuple[str, str]] = Counter()
        num_shards = {split: len(writer.shards) for split, writer in self._writers.items()}
        digests = b"".join(document.digest for document in chunk.documents)
        is_new = [True] * len(chunk.documents) if self._seen is None else self._seen.add(digests).tolist()
        for place, (document, new) in enumerate(zip(chunk.documents, is_new, strict=True), 1):
            if not new:
                self.num_repeated += 1
                continue
            split = "val" if document.is_val else "train"
            self._num_met[split] += 1
            if self._num_met[split] > self._num_written[split]:
                assert document.encoded is not None
                tokens, targets, _ = document.encoded
                self._writers[split].add_document(
                    np.frombuffer(tokens, self._dtype),
                    document.num_bytes,
                    np.frombuffer(targets, np.uint8) if targets else None,
                )
            written += Counter({(split, "documents"): 1, (split, "bytes"): document.num_bytes})
            self.num_documents += 1
            self.num_bytes += document.num_bytes
            if self._is_full():
                self.limit_reached = True
                rest = zip(chunk.documents[place:], is_new[place:], strict=True)
                self._unwritten = [document.digest for document, new in rest if new]
                break
        for split, writer in self._writers.items():
            for shard in writer.shards[num_shards[split] :]:
                # The documents of the shard now begun may start in this very chunk.
                self._folder.add_shard(split, shard, index)
        return written

    def finish(self) -> dict[str, dict[str, int]]:
        """Complete all splits and the file of digests; returns the totals. An empty validation split is left out.

        Raises:
            UserError: there is no document to train on.
        """
        if not self._num_met["train"]:
            raise UserError("the inputs hold no document for the training split: nothing to prepare")
        if self._seen is not None:
            self._seen.save(self._folder.partial / digests_name(self._folder.part), self._unwritten)
        totals = {}
        for split, writer in self._writers.items():
            if not writer.num_documents:
                shutil.rmtree(writer.folder)
                continue
            manifest = writer.close()
            totals[split] = {
                "documents": manifest.total_documents,
                "tokens": manifest.total_tokens,
                "bytes": manifest.total_bytes,
            }
        return totals

    def discard(self) -> None:
        """Drop the shards being written; the finished ones stay."""
        for writer in self._writers.values():
            writer.discard()

    def _is_full(self) -> bool:
        # After an interruption a split has tokens of later documents already, but never so many that this is true
        # before it was true in an uninterrupted run: that run did not end at the shards which are finished.
        tokens = sum(writer.num_tokens for writer in self._writers.values())
        counts = (self.num_documents, tokens, self.num_bytes)
        return any(limit is not None and count >= limit for count, limit in zip(counts, self._limits, strict=True))
