"""The work of one process: a chunk of input becomes tokens, the split of each document, and digests.

What comes out depends on the chunk alone.
"""

import functools
import hashlib
import itertools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from data_prep.reading.byte_stream import Source
from data_prep.reading.chunks import Chunk
from data_prep.reading.documents import parse_chunk
from data_prep.reading.records import FormedText, ReadOptions, Rejected
from data_prep.writing.digests import DIGEST_BYTES
from minimind.data.manifest import DocumentKind
from minimind.data.shard_writer import DEFAULT_SHARD_TOKENS
from minimind.data.tokenizer import Tokenizer, load_tokenizer
from minimind.schema import AT_LEAST_1, Limits

_HASH_RANGE = 1 << 64
_load_tokenizer = functools.lru_cache(maxsize=1)(load_tokenizer)


@dataclass(frozen=True, kw_only=True)
class CorpusOptions(ReadOptions):
    """With the inputs, what decides the contents of a corpus."""

    tokenizer: Path
    """SentencePiece tokenizer.model, Hugging Face tokenizer.json, or the folder of one."""
    eos_token: str | None = None
    """Special token that ends each document (found by its name in the tokenizer)."""
    special_text: Literal["special", "plain"] = "special"
    """A special token's text inside a document, such as <|im_end|>: becomes that token, or plain text."""
    val_fraction: Annotated[float | None, Limits(at_least=0, below=1)] = None
    """Fraction of documents for validation, chosen by a hash of their text (0.01 without --val-input)."""
    max_documents: Annotated[int | None, AT_LEAST_1] = None
    """Stop after so many documents, from the beginning of the inputs, validation included."""
    max_tokens: Annotated[int | None, AT_LEAST_1] = None
    """Stop after so many tokens."""
    max_bytes: Annotated[int | None, AT_LEAST_1] = None
    """Stop after so many bytes of text."""
    dedup: bool = False
    """Drop documents whose text came before (16 bytes of memory for each document, 32 at moments)."""
    shard_tokens: Annotated[int, AT_LEAST_1] = DEFAULT_SHARD_TOKENS
    """Tokens in a shard."""

    def encode(self, tokenizer: Tokenizer, texts: list[str]) -> "list[Encoded | Rejected]":
        """The tokens of each text, or why there are none."""
        packed = tokenizer.encode_packed(texts, allow_special=self.special_text == "special")
        nothing = Rejected("the tokenizer has no token for anything in it")
        return [Encoded(tokens) if tokens else nothing for tokens in packed]

    def template_text(self, tokenizer: Tokenizer) -> str | None:
        """The chat template that conversations are written with."""
        return None

    @property
    def kind(self) -> DocumentKind | None:
        """What a document is, where it is more than one text."""
        return None

    def check_sources(self, sources: list[Source]) -> None:
        """Raise `UserError` for an input that cannot hold such documents."""


class Encoded(NamedTuple):
    """What a document became."""

    tokens: bytes  # uint16 each, or uint32 for a large vocabulary
    targets: bytes = b""  # of conversations: a value for each token, as the shards have them
    num_bytes: int | None = None  # UTF-8 bytes, where they are not those of the document's text


class Task(NamedTuple):
    """A chunk, and the splits of it that are needed: an interrupted run has the others already."""

    chunk: Chunk
    encode_train: bool = True
    encode_val: bool = True


class EncodedDocument(NamedTuple):
    """One good document."""

    is_val: bool
    num_bytes: int
    digest: bytes  # (16,)
    encoded: Encoded | None  # none in a split that was not needed


class EncodedChunk(NamedTuple):
    """The documents of a chunk."""

    source: Source
    documents: list[EncodedDocument]
    problems: list[str]
    num_empty: int
    forms: Counter[str]  # of records, where the text says it
    progress: int


def encode_chunk(options: CorpusOptions, task: Task) -> EncodedChunk:
    """Parse, split and encode one chunk, with a tokenizer that each process loads once."""
    source, tokenizer = task.chunk.source, _load_tokenizer(options.tokenizer, options.eos_token)
    texts, lines, problems, num_empty = parse_chunk(task.chunk, options)
    data = [text.encode() for text in texts]
    digests = [hashlib.blake2b(text, digest_size=DIGEST_BYTES).digest() for text in data]
    # By the first half of the hash of the text: no other document, file or order moves one from split to split.
    limit = int((1.0 if source.is_val else options.val_fraction or 0.0) * _HASH_RANGE)
    is_val = [int.from_bytes(digest[:8], "big") < limit for digest in digests]
    # A tokenizer that loses text, or a chat template, may refuse a document, which only encoding shows.
    may_refuse = not tokenizer.is_lossless or options.reads_whole_records
    is_needed = [(task.encode_val if val else task.encode_train) or may_refuse for val in is_val]
    encoded = iter(options.encode(tokenizer, list(itertools.compress(texts, is_needed))))
    documents = []
    for line, text, digest, val, need in zip(lines, data, digests, is_val, is_needed, strict=True):
        document = next(encoded) if need else None
        if isinstance(document, Rejected):
            problems.append(f"{source.name}:{line}: {document}")
            continue
        num_bytes = document.num_bytes if document and document.num_bytes is not None else len(text)
        documents.append(EncodedDocument(val, num_bytes, digest, document))
    forms = Counter(text.form for text in texts if isinstance(text, FormedText))
    return EncodedChunk(source, documents, problems, num_empty, forms, task.chunk.progress)
