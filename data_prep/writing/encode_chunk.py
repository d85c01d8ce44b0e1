"""The work of one process: a chunk of input becomes tokens, the split of each document, and digests.

What comes out depends on the chunk alone.
"""

import hashlib
import itertools
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.reading.byte_stream import Source
from data_prep.reading.chunks import Chunk
from data_prep.reading.documents import Problem, parse_chunk
from data_prep.reading.records import ReadOptions
from data_prep.writing.digests import DIGEST_BYTES
from minimind.data.tokenizer import Tokenizer, load_tokenizer

_HASH_RANGE = 1 << 64


@dataclass(frozen=True)
class EncodeOptions:
    """What every worker needs. `read` has the fields of `ReadOptions`."""

    tokenizer_file: Path
    eos_token: str | None
    read: ReadOptions
    val_fraction: float
    allow_special: bool


@dataclass(frozen=True)
class Task:
    """A chunk, and the splits of it that are needed: an interrupted run has the others already."""

    chunk: Chunk
    encode_train: bool = True
    encode_val: bool = True


@dataclass(frozen=True)
class EncodedChunk:
    """The good documents of a chunk, n of them. Documents of a split that was not needed have length 0."""

    source: Source
    problems: list[Problem]
    num_empty: int
    is_val: np.ndarray  # (n,) bool
    sizes: np.ndarray  # (n,) int64, bytes of text
    digests: bytes  # (n * 16)
    lengths: np.ndarray  # (n,) int64, tokens
    tokens: np.ndarray  # (sum of lengths,) uint16, or uint32 for a large vocabulary
    progress: int


class _Worker:
    """This process's tokenizer, loaded once."""

    tokenizer: Tokenizer
    options: EncodeOptions


def start_worker(options: EncodeOptions) -> None:
    """Prepare this process for `encode_chunk`."""
    # One process a core: threads of the library would only get into each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _Worker.tokenizer = load_tokenizer(options.tokenizer_file, options.eos_token)
    _Worker.options = options


def encode_chunk(task: Task) -> EncodedChunk:
    """Parse, split and encode one chunk."""
    options, tokenizer, source = _Worker.options, _Worker.tokenizer, task.chunk.source
    texts, lines, problems, num_empty = parse_chunk(task.chunk, options.read)
    data = [text.encode() for text in texts]
    digests = [hashlib.blake2b(text, digest_size=DIGEST_BYTES).digest() for text in data]
    fraction = 1.0 if source.is_val else options.val_fraction
    is_val = assign_val(b"".join(digests), fraction)
    # A tokenizer that loses text may leave a document without tokens, which only encoding shows.
    is_needed = np.where(is_val, task.encode_val, task.encode_train) | (not tokenizer.is_lossless)
    packed = iter(tokenizer.encode_packed(list(itertools.compress(texts, is_needed)), options.allow_special))
    ids = [next(packed) if needed else b"" for needed in is_needed]
    is_good = np.array([bool(tokens) or not needed for tokens, needed in zip(ids, is_needed, strict=True)], dtype=bool)
    problems += [
        Problem(source.name, line, "the tokenizer has no token for anything in it")
        for line in itertools.compress(lines, ~is_good)
    ]
    dtype = np.dtype(tokenizer.typecode)
    return EncodedChunk(
        source=source,
        problems=problems,
        num_empty=num_empty,
        is_val=is_val[is_good],
        sizes=np.array([len(text) for text in data], dtype=np.int64)[is_good],
        digests=b"".join(itertools.compress(digests, is_good)),
        lengths=np.array([len(document) // dtype.itemsize for document in ids], dtype=np.int64)[is_good],
        tokens=np.frombuffer(b"".join(ids), dtype=dtype),
        progress=task.chunk.progress,
    )


def assign_val(digests: bytes, fraction: float) -> np.ndarray:
    """(n,) bool: the documents of the validation split, by the first half of their digests (blake2b of the text).

    A pure function of each text: no other document, file or order moves one from split to split.
    """
    ranks = np.frombuffer(digests, dtype=">u8").reshape(-1, 2)[:, 0]
    return ranks <= np.uint64(int(fraction * _HASH_RANGE) - 1) if fraction > 0 else np.zeros(len(ranks), dtype=bool)
