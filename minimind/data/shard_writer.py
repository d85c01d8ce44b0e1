"""Writes a shard folder: documents go in one after another, and the manifest comes out last.

Holds one document in memory, whatever the corpus.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minimind.data.array_file import ArrayFile, check_array_file
from minimind.data.chat_template import TEMPLATE_NAME
from minimind.data.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    DocumentKind,
    Manifest,
    ShardError,
    ShardInfo,
    TokenizerInfo,
)
from minimind.files import disk_errors, fsync_folder, hash_file, replace_file

DEFAULT_SHARD_TOKENS = 1 << 26


class ShardWriter:
    """Writes documents into `folder`, in shards of about `shard_tokens` tokens (a longer document gets its own shard).

    Use it as a context manager: leaving it writes the manifest, leaving it by an exception drops the shard being
    written. `shards` are those that an earlier writer finished here: the documents given now follow theirs. The first
    shard of the folder has the number `first_shard` in its name. With a `chat_template` the documents are
    conversations, each with its targets.
    Raises `ShardError` for a folder that holds other shards, and `OSError` when the disk refuses.
    """

    def __init__(
        self,
        folder: Path,
        *,
        vocab_size: int,
        eos_token_id: int,
        tokenizer_file: Path,
        shard_tokens: int = DEFAULT_SHARD_TOKENS,
        shards: Sequence[ShardInfo] = (),
        first_shard: int = 0,
        chat_template: str | None = None,
        kind: DocumentKind | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.shards = list(shards)
        self.num_documents = sum(shard.documents for shard in shards)
        self.num_tokens = sum(shard.tokens for shard in shards)
        self._shard_tokens = shard_tokens
        self._first_shard = first_shard
        self._vocab_size = vocab_size
        self._dtype = np.dtype("uint16" if vocab_size <= 1 << 16 else "uint32")
        self._eos_token_id = eos_token_id
        self._files: list[ArrayFile] = []
        self._bytes = 0
        self._kind = kind
        self.folder.mkdir(parents=True, exist_ok=True)
        found = {path.name for path in [*self.folder.glob("shard_*.npy"), *self.folder.glob(MANIFEST_NAME)]}
        if found - {name for shard in shards for name in shard.files}:
            raise ShardError(f"{self.folder} already holds shards: delete it or choose another folder")
        for shard in shards:
            for name, dtype, length in shard.arrays(self._dtype.name):
                check_array_file(self.folder / name, dtype, length)
        self._tokenizer = self.folder / tokenizer_file.name
        replace_file(self._tokenizer, tokenizer_file.read_bytes())
        self._template: Path | None = None
        if chat_template is not None:
            self._template = self.folder / TEMPLATE_NAME
            replace_file(self._template, chat_template)

    def add_document(self, tokens: np.ndarray, num_bytes: int, targets: np.ndarray | None = None) -> None:
        """Append one document of `num_bytes` UTF-8 bytes of text: `tokens` (1-D, integer) and the end token. Of a
        conversation, `targets` (1-D, 0 or 1 for each token) says which are trained; the end token never is. The values
        for a pair (`kind`) are those of `minimind.data.manifest`."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
            raise ShardError(f"document {self.num_documents} is not a non-empty 1-D array of token ids")
        for token in (int(tokens.min()), int(tokens.max())):
            if not 0 <= token < self._vocab_size:
                raise ShardError(
                    f"document {self.num_documents} has token id {token}; the vocabulary has {self._vocab_size}"
                )
        if self._template is not None and (targets is None or targets.shape != tokens.shape):
            raise ShardError(f"conversation {self.num_documents} needs a target, yes or no, for each of its tokens")
        if self._files and self._files[0].length + tokens.size + 1 > self._shard_tokens:
            self._finish_shard()
        if not self._files:
            path = self.folder / f"shard_{self._first_shard + len(self.shards):05d}"
            kinds = {".npy": self._dtype.name, ".docs.npy": "int64"}
            kinds |= {} if self._template is None else {".targets.npy": "uint8"}
            self._files = [ArrayFile(path.with_suffix(suffix), dtype) for suffix, dtype in kinds.items()]
        token_file, starts_file, *target_files = self._files
        starts_file.append(np.array([token_file.length]))
        token_file.append(np.append(tokens, self._eos_token_id))
        if target_files and targets is not None:
            target_files[0].append(np.append(targets, 0))
        self._bytes += num_bytes
        self.num_documents += 1
        self.num_tokens += tokens.size + 1

    def close(self) -> Manifest:
        """Finish the last shard and write the manifest: from here on the folder is complete."""
        self._finish_shard()
        manifest = Manifest(
            1 if self._template is None else FORMAT_VERSION,
            self._dtype.name,
            self._vocab_size,
            self._eos_token_id,
            TokenizerInfo(self._tokenizer.name, hash_file(self._tokenizer)),
            self.num_tokens,
            self.num_documents,
            sum(shard.bytes for shard in self.shards),
            tuple(self.shards),
            None if self._template is None else hash_file(self._template),
            self._kind,
        )
        manifest.save(self.folder)
        return manifest

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.discard()

    def discard(self) -> None:
        """Drop the shard being written; the finished ones stay."""
        for file in self._files:
            file.discard()

    def _finish_shard(self) -> None:
        if not self._files:
            return
        token_file, starts_file, *target_files = self._files
        shard = ShardInfo(
            file=token_file.path.name,
            documents_file=starts_file.path.name,
            tokens=token_file.length,
            documents=starts_file.length,
            bytes=self._bytes,
            sha256=token_file.finish(),
            documents_sha256=starts_file.finish(),
            targets_file=target_files[0].path.name if target_files else None,
            targets_sha256=target_files[0].finish() if target_files else None,
        )
        fsync_folder(self.folder)
        self.shards.append(shard)
        self._files, self._bytes = [], 0


def write_random_tokens(folder: Path, vocab_size: int, tokens: int, document_tokens: int = 500) -> Path:
    """A corpus of random walks over the vocabulary, which a model can learn, in documents of about so many tokens."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = folder / "tokenizer.json"
        tokenizer.write_text("{}")
        walk = 1 + np.random.default_rng(0).integers(1, 4, tokens).cumsum() % (vocab_size - 1)
        with ShardWriter(folder / "train", vocab_size=vocab_size, eos_token_id=0, tokenizer_file=tokenizer) as writer:
            for document in np.array_split(walk, -(-tokens // document_tokens)):
                writer.add_document(document, num_bytes=len(document))
    return folder
