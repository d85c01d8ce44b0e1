"""What the tests of shards share."""

from pathlib import Path

import pytest


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"a tokenizer")
    return path
