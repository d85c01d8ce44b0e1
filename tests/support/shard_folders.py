"""Small shard folders of random documents, for the tests of everything that reads shards."""

from pathlib import Path

import numpy as np

from minimind.data.manifest import Manifest, ShardInfo, TokenizerInfo
from minimind.data.shard_writer import ShardWriter
from minimind.files import hash_file

EOS = 0
SEQ_LEN = 16  # of the windows that `dataset` has


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


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_by_hand(folder: Path, tokens: list[int], starts: list[int]) -> None:
    """A shard folder whose hashes are right, whatever the values."""
    folder.mkdir()
    np.save(folder / "shard_00000.npy", np.array(tokens, dtype="<u2"))
    np.save(folder / "shard_00000.docs.npy", np.array(starts, dtype="<i8"))
    (folder / "tokenizer.model").write_bytes(b"t")
    hashes = [hash_file(folder / name) for name in ("shard_00000.npy", "shard_00000.docs.npy", "tokenizer.model")]
    shard = ShardInfo("shard_00000.npy", "shard_00000.docs.npy", len(tokens), len(starts), 9, *hashes[:2])
    tokenizer = TokenizerInfo("tokenizer.model", hashes[2])
    Manifest(1, "uint16", 10, EOS, tokenizer, len(tokens), len(starts), 9, (shard,)).save(folder)
