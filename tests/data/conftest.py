"""What the tests of shards and of what reads them share."""

from pathlib import Path

import numpy as np
import pytest
from shard_folders import SEQ_LEN, make_documents, write

from minimind.data.dataset import TokenDataset
from minimind.data.shards import ShardReader


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"a tokenizer")
    return path


@pytest.fixture(scope="module")
def documents() -> list[np.ndarray]:
    return make_documents(60)


@pytest.fixture(scope="module")
def reader(tmp_path_factory, documents) -> ShardReader:
    folder = tmp_path_factory.mktemp("shards")
    (folder / "tokenizer.model").write_bytes(b"t")
    write(folder / "train", folder / "tokenizer.model", documents)
    return ShardReader(folder / "train")


@pytest.fixture(scope="module")
def dataset(reader) -> TokenDataset:
    return TokenDataset(reader, SEQ_LEN)
