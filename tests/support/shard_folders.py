"""Small shard folders of random documents, for the tests of everything that reads shards."""

from pathlib import Path

import numpy as np

from minimind.data.manifest import Manifest
from minimind.data.shard_writer import ShardWriter

EOS = 0


def make_documents(count: int = 50, vocab_size: int = 6400, seed: int = 0, longest: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, vocab_size, size=rng.integers(1, longest)) for _ in range(count)]


def stream_of(documents: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.append(document, EOS) for document in documents])


def open_writer(folder: Path, tokenizer_file: Path, **options) -> ShardWriter:
    settings = {"vocab_size": 6400, "eos_token_id": EOS, "shard_tokens": 100, **options}
    return ShardWriter(folder, tokenizer_file=tokenizer_file, **settings)


def write(folder: Path, tokenizer_file: Path, documents: list[np.ndarray], **options) -> Manifest:
    with open_writer(folder, tokenizer_file, **options) as writer:
        for document in documents:
            writer.add_document(document, num_bytes=3 * len(document))
        return writer.close()
