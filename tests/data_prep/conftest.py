"""What the tests of tokenize_corpus share."""

from pathlib import Path

import pytest
from prepared_corpus import Prepare, make_texts

import data_prep.reading.chunks
from data_prep.train_tokenizer import cut_sentences, save_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(list(cut_sentences(make_texts(100))), 320), folder)
    return folder


@pytest.fixture
def prepare(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    return Prepare(tokenizer_folder, monkeypatch)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks out of small files (in this process only)."""
    monkeypatch.setattr(data_prep.reading.chunks, "CHUNK_BYTES", 3000)
