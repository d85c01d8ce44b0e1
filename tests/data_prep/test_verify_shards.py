"""The command that reads a prepared corpus whole."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from repository import ROOT
from shard_folders import make_documents, write

from data_prep.verify_shards import format_totals, verify_corpus
from minimind.data.manifest import ShardError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(b"t")
    write(tmp_path / "corpus" / "train", tokenizer, make_documents(50))
    write(tmp_path / "corpus" / "val", tokenizer, make_documents(5, seed=1))
    return tmp_path / "corpus"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_prep.verify_shards", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_whole_corpus_prints_its_totals(corpus):
    manifests = verify_corpus(corpus)
    done = run(corpus)
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["split", "train", "val"]
    for line, manifest in zip(lines[1:3], manifests.values(), strict=True):
        figures = [len(manifest.shards), manifest.total_documents, manifest.total_tokens, manifest.total_bytes]
        assert line.split()[1:5] == [f"{figure:,}" for figure in figures]
    assert done.stdout.startswith(format_totals(manifests))


def test_one_shard_folder_alone_is_verified_too(corpus):
    assert list(verify_corpus(corpus / "val")) == ["val"]
    assert list(verify_corpus(corpus / "train")) == ["train"]


def test_damage_is_one_line_naming_the_file(corpus):
    path = corpus / "val" / "shard_00000.npy"
    content = bytearray(path.read_bytes())
    content[-3] ^= 64
    path.write_bytes(content)
    done = run(corpus)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {path} is damaged") and done.stderr.count("\n") == 1


def test_nothing_to_verify_is_one_line(tmp_path):
    done = run(tmp_path / "nowhere")
    assert done.returncode == 2 and "does not exist" in done.stderr and done.stderr.count("\n") == 1


def test_a_missing_folder_name_is_one_line():
    done = run()
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_splits_of_different_tokenizers_are_refused(corpus, tmp_path):
    other = tmp_path / "tokenizer.json"
    other.write_bytes(b"another")
    for path in (corpus / "val").iterdir():
        path.unlink()
    write(corpus / "val", other, [np.array([1, 2])])
    with pytest.raises(ShardError, match="different tokenizers"):
        verify_corpus(corpus)
