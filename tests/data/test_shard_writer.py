"""Writing token shards: interrupted, continued, out of disk, and never over what is there."""

import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from repository import ROOT
from shard_folders import folder_bytes, make_documents, open_writer, write

from minimind.data.array_file import npy_header
from minimind.data.manifest import ShardError
from minimind.data.shards import ShardReader, verify
from minimind.errors import UserError
from minimind.files import disk_errors

# Processes of their own find the helpers of the tests too.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "support")}


def test_nothing_but_the_finished_files_remains(tmp_path, tokenizer_file):
    manifest = write(tmp_path / "train", tokenizer_file, make_documents())
    shard_files = {name for shard in manifest.shards for name in (shard.file, shard.documents_file)}
    assert set(os.listdir(tmp_path / "train")) == {"manifest.json", "tokenizer.model", *shard_files}
    assert (tmp_path / "train" / "tokenizer.model").read_bytes() == b"a tokenizer"


def test_an_empty_split_is_a_finished_folder(tmp_path, tokenizer_file):
    manifest = write(tmp_path / "val", tokenizer_file, [])
    assert verify(tmp_path / "val") == manifest
    assert ShardReader(tmp_path / "val").num_tokens == 0


@pytest.mark.parametrize(
    ("tokens", "said"),
    [([], "non-empty"), ([[1, 2]], "1-D"), ([1.5], "token ids"), ([1, 6400], "token id 6400"), ([-1], "token id -1")],
)
def test_impossible_documents_are_refused(tmp_path, tokenizer_file, tokens, said):
    with pytest.raises(ShardError, match=said), open_writer(tmp_path / "train", tokenizer_file) as writer:
        writer.add_document(np.array(tokens), 1)


def test_an_error_in_the_middle_leaves_no_manifest_and_no_temporary_file(tmp_path, tokenizer_file):
    with pytest.raises(RuntimeError), open_writer(tmp_path / "train", tokenizer_file) as writer:
        for document in make_documents():
            writer.add_document(document, 1)
        raise RuntimeError("interrupted")
    names = os.listdir(tmp_path / "train")
    assert "shard_00000.npy" in names
    assert "manifest.json" not in names and not [name for name in names if name.endswith(".tmp")]
    with pytest.raises(ShardError, match=r"no manifest\.json"):
        ShardReader(tmp_path / "train")
    with pytest.raises(ShardError, match="already holds shards"):
        open_writer(tmp_path / "train", tokenizer_file)


@pytest.mark.parametrize("stop_after", [0, 1, 6, 23, 49, 50])
def test_a_continued_preparation_ends_with_the_same_bytes(tmp_path, tokenizer_file, stop_after):
    documents = make_documents()
    write(tmp_path / "whole", tokenizer_file, documents)
    writer = open_writer(tmp_path / "train", tokenizer_file)
    for document in documents[:stop_after]:
        writer.add_document(document, 3 * len(document))
    writer.discard()
    with open_writer(tmp_path / "train", tokenizer_file, shards=writer.shards) as writer:
        assert stop_after - 20 < writer.num_documents <= stop_after
        for document in documents[writer.num_documents :]:
            writer.add_document(document, 3 * len(document))
    assert folder_bytes(tmp_path / "whole") == folder_bytes(tmp_path / "train")


def test_a_lost_shard_stops_the_continuation(tmp_path, tokenizer_file):
    writer = open_writer(tmp_path / "train", tokenizer_file)
    for document in make_documents():
        writer.add_document(document, 1)
    writer.discard()
    (tmp_path / "train" / "shard_00001.npy").unlink()
    before = folder_bytes(tmp_path / "train")
    with pytest.raises(ShardError, match=r"shard_00001\.npy is missing"):
        open_writer(tmp_path / "train", tokenizer_file, shards=writer.shards)
    assert folder_bytes(tmp_path / "train") == before


def test_a_finished_folder_is_never_written_again(tmp_path, tokenizer_file):
    write(tmp_path / "train", tokenizer_file, make_documents())
    before = folder_bytes(tmp_path / "train")
    with pytest.raises(ShardError, match="already holds shards"):
        open_writer(tmp_path / "train", tokenizer_file)
    assert folder_bytes(tmp_path / "train") == before


def test_foreign_shards_are_never_overwritten(tmp_path, tokenizer_file):
    (tmp_path / "train").mkdir()
    np.save(tmp_path / "train" / "shard_00000.npy", np.arange(3))
    with pytest.raises(ShardError, match="already holds shards"):
        open_writer(tmp_path / "train", tokenizer_file)
    assert os.listdir(tmp_path / "train") == ["shard_00000.npy"]


def test_a_full_disk_is_one_line_and_the_finished_shards_stay(tmp_path, tokenizer_file):
    program = """
import resource, sys
from pathlib import Path
from minimind.errors import UserError
from minimind.files import disk_errors
from shard_folders import make_documents, open_writer
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    with disk_errors("train"), open_writer(Path(sys.argv[1]), Path(sys.argv[2]), shard_tokens=400_000) as writer:
        writer.add_document(make_documents(1, longest=2)[0], 1)
        for _ in range(3):
            writer.add_document([1] * 300_000, 1)
        writer.add_document([1] * 10**6, 1)
        writer.add_document([1], 1)
except UserError as error:
    print(error)
"""
    arguments = [sys.executable, "-c", program, str(tmp_path / "train"), str(tokenizer_file)]
    done = subprocess.run(arguments, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True, text=True)
    assert "cannot write" in done.stdout and done.stdout.count("\n") == 1 and not done.stderr
    left = sorted(os.listdir(tmp_path / "train"))
    shards = [f"shard_0000{i}{kind}.npy" for i in range(3) for kind in (".docs", "")]
    assert left == [*shards, "tokenizer.model"]


def test_a_folder_that_cannot_be_made_is_one_line(tokenizer_file):
    folder = tokenizer_file / "train"
    with pytest.raises(UserError, match=f"cannot write {folder}: Not a directory"), disk_errors(folder):
        open_writer(folder, tokenizer_file)


def test_the_writer_holds_no_shard_in_memory(tmp_path, tokenizer_file):
    document = np.ones(1000, dtype=np.uint16)
    with open_writer(tmp_path / "train", tokenizer_file, shard_tokens=10**8) as writer:
        tracemalloc.start()
        for _ in range(5000):  # 10 MB of tokens in one shard
            writer.add_document(document, 1)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1_500_000


def test_our_header_is_that_of_numpy(tmp_path):
    for dtype, length in (("uint16", 3), ("uint32", 12345), ("int64", 10**6)):
        np.save(tmp_path / "a.npy", np.zeros(length, dtype=dtype))
        assert (tmp_path / "a.npy").read_bytes()[:128] == npy_header(dtype, length)
