"""Small shards for every test that trains: a stream with structure, so that a loss can fall."""

import os
from pathlib import Path

# Before torch is imported, for this process and those it starts: threads that wait for one another cost products as
# small as the tests' many times what they give, most of all where several processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

from minimind.data.shards import ShardWriter

VOCAB_SIZE = 256


def write_corpus(
    folder: Path, *, tokens: int, val_tokens: int = 0, vocab_size: int = VOCAB_SIZE, seed: int = 0
) -> Path:
    """A corpus folder whose documents follow x -> (5x + noise) mod vocab_size, of 20 to 200 tokens each."""
    rng = np.random.default_rng(seed)
    tokenizer = folder.with_name(folder.name + "-tokenizer.json")
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.write_text("{}")
    for split, wanted in (("train", tokens), ("val", val_tokens)):
        if not wanted:
            continue
        writer = ShardWriter(
            folder / split, vocab_size=vocab_size, eos_token_id=0, tokenizer_file=tokenizer, shard_tokens=4000
        )
        written = 0
        while written < wanted:
            length = int(rng.integers(20, 200))
            document = np.empty(length, dtype=np.int64)
            document[0] = rng.integers(3, vocab_size)
            for i in range(1, length):
                document[i] = 3 + (5 * document[i - 1] + rng.integers(0, 3)) % (vocab_size - 3)
            writer.add_document(document, num_bytes=3 * length)
            written += length + 1
        writer.close()
    return folder


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 30,000 training and 3,000 validation tokens."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tiny", tokens=30_000, val_tokens=3_000)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker runs all tests of a file, and one all that start services: those have the ports to themselves."""
    for item in items:
        group = "cluster" if item.get_closest_marker("cluster") else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))
