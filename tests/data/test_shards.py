"""Token shards read back: round trips, fingerprint, splits, size."""

import json
import os
import time
import tracemalloc
from pathlib import Path

import numpy as np
import psutil
import pytest
from shard_folders import EOS, folder_bytes, make_documents, stream_of, write, write_by_hand

from minimind.data import shards
from minimind.data.manifest import Manifest, ShardError, ShardInfo, TokenizerInfo
from minimind.data.shards import ShardReader, find_split, open_split, verify
from minimind.files import hash_file


def test_round_trip_across_shards(tmp_path, tokenizer_file):
    documents = make_documents()
    manifest = write(tmp_path / "train", tokenizer_file, documents)
    stream = stream_of(documents)
    assert len(manifest.shards) > 5
    assert all(shard.tokens <= 100 for shard in manifest.shards)
    assert manifest == Manifest.load(tmp_path / "train") == verify(tmp_path / "train")
    assert (manifest.dtype, manifest.total_tokens, manifest.total_documents) == ("uint16", len(stream), 50)
    assert manifest.total_bytes == 3 * (len(stream) - 50)
    assert manifest.bytes_per_token == manifest.total_bytes / len(stream)

    reader = ShardReader(tmp_path / "train")
    starts = np.cumsum([0, *(len(document) + 1 for document in documents)])[:-1]
    assert reader.num_tokens == len(stream)
    rng = np.random.default_rng(1)
    spans = [(0, len(stream)), (len(stream), 0), (0, 0), (0, 1), (len(stream) - 1, 1)]
    spans += [(start, int(rng.integers(0, len(stream) - start))) for start in rng.integers(0, len(stream), size=200)]
    for start, length in spans:
        tokens = reader.read(int(start), length)
        assert tokens.dtype == np.uint16
        np.testing.assert_array_equal(tokens, stream[start : start + length])
        inside = starts[(starts >= start) & (starts < start + length)] - start
        np.testing.assert_array_equal(reader.document_starts(int(start), length), inside)


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 10**9), (5, -1)])
def test_reading_outside_the_stream_is_refused(tmp_path, tokenizer_file, start, length):
    write(tmp_path / "train", tokenizer_file, make_documents(5))
    with pytest.raises(IndexError):
        ShardReader(tmp_path / "train").read(start, length)


def test_shards_are_plain_numpy_files(tmp_path, tokenizer_file):
    documents = make_documents(3)
    manifest = write(tmp_path / "train", tokenizer_file, documents, shard_tokens=10**6)
    tokens = np.load(tmp_path / "train" / manifest.shards[0].file)
    starts = np.load(tmp_path / "train" / manifest.shards[0].documents_file)
    np.testing.assert_array_equal(tokens, stream_of(documents))
    assert (tokens.dtype, starts.dtype, starts[1]) == (np.dtype("<u2"), np.dtype("<i8"), len(documents[0]) + 1)


def test_a_vocabulary_beyond_16_bits_takes_32(tmp_path, tokenizer_file):
    documents = [np.array([1, 65535, 65536, 99_999])]
    manifest = write(tmp_path / "train", tokenizer_file, documents, vocab_size=100_000)
    reader = ShardReader(tmp_path / "train")
    assert manifest.dtype == "uint32"
    np.testing.assert_array_equal(reader.read(0, 5), [1, 65535, 65536, 99_999, EOS])
    at_the_edge = write(tmp_path / "edge", tokenizer_file, [np.array([65535])], vocab_size=65536)
    assert at_the_edge.dtype == "uint16"


def test_a_document_longer_than_a_shard_stays_whole(tmp_path, tokenizer_file):
    documents = [np.full(7, 1), np.full(1000, 2), np.full(7, 3)]
    manifest = write(tmp_path / "train", tokenizer_file, documents)
    assert [shard.tokens for shard in manifest.shards] == [8, 1001, 8]


def test_the_same_documents_give_the_same_bytes(tmp_path, tokenizer_file):
    for name in ("a", "b"):
        write(tmp_path / name, tokenizer_file, make_documents())
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")
    fingerprint = ShardReader(tmp_path / "a").fingerprint
    assert fingerprint == ShardReader(tmp_path / "b").fingerprint


def test_the_fingerprint_sees_each_token_and_each_border(tmp_path):
    contents = {"a": ([5, 0, 6, 0], [0, 2]), "b": ([5, 0, 7, 0], [0, 2]), "c": ([0, 5, 6, 0], [0, 2]),
                "d": ([5, 0, 6, 0], [0, 3]), "e": ([5, 0, 6, 0], [0])}  # fmt: skip
    for name, (tokens, starts) in contents.items():
        write_by_hand(tmp_path / name, tokens, starts)
    assert len({ShardReader(tmp_path / name).fingerprint for name in contents}) == 5
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    manifest["total_bytes"] = manifest["shards"][0]["bytes"] = 10  # what decides no token
    before = ShardReader(tmp_path / "a").fingerprint
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifest))
    assert ShardReader(tmp_path / "a").fingerprint == before


def test_splits_are_found_by_corpus_and_by_folder(tmp_path, tokenizer_file):
    train = write(tmp_path / "corpus" / "train", tokenizer_file, make_documents())
    with pytest.raises(ShardError, match="no val split"):
        open_split(tmp_path / "corpus", "val")
    val = write(tmp_path / "corpus" / "val", tokenizer_file, make_documents(5, seed=1))
    assert open_split(tmp_path / "corpus", "train").manifest == train
    assert open_split(tmp_path / "corpus", "val").manifest == val
    assert open_split(tmp_path / "corpus" / "val", "val").manifest == val
    # Validation must never read training data because the folder was given one level too deep.
    assert find_split(tmp_path / "corpus" / "train", "val") is None
    assert find_split(tmp_path / "corpus" / "val", "train") is None
    write(tmp_path / "mine", tokenizer_file, make_documents())
    assert find_split(tmp_path / "mine", "train") == tmp_path / "mine"
    assert find_split(tmp_path / "mine", "val") is None


def test_a_corpus_in_the_making_is_unfinished(tmp_path, tokenizer_file):
    (tmp_path / ".partial").mkdir()
    with pytest.raises(ShardError, match=r"is not finished: run data_prep\.tokenize_corpus again"):
        open_split(tmp_path, "train")
    write(tmp_path / "train", tokenizer_file, make_documents())
    open_split(tmp_path, "train")  # another is made to take its place
    (tmp_path / ".partial" / "corpus.json").touch()  # and its parts are moved
    with pytest.raises(ShardError, match="is not finished"):
        open_split(tmp_path, "train")


def test_no_shards_is_one_line(tmp_path):
    with pytest.raises(ShardError, match="does not exist"):
        open_split(tmp_path / "nowhere", "train")
    with pytest.raises(ShardError, match="no finished shards"):
        open_split(tmp_path, "train")
    (tmp_path / "file").touch()
    with pytest.raises(ShardError, match="is a file: give the folder of a corpus"):
        open_split(tmp_path / "file", "train")


def make_many_shards(folder: Path, count: int) -> None:
    """`count` shards of one token file's content, as hard links: quick to make, and each a file to open."""
    folder.mkdir()
    tokens = np.tile(np.array([7, 8, 9, EOS], dtype="<u2"), 16)
    np.save(folder / "shard_00000.npy", tokens)
    np.save(folder / "shard_00000.docs.npy", np.arange(0, 64, 4, dtype="<i8"))
    (folder / "tokenizer.model").write_bytes(b"t")
    hashes = [hash_file(folder / name) for name in ("shard_00000.npy", "shard_00000.docs.npy", "tokenizer.model")]
    shards = []
    for index in range(count):
        names = (f"shard_{index:05d}.npy", f"shard_{index:05d}.docs.npy")
        if index:
            os.link(folder / "shard_00000.npy", folder / names[0])
            os.link(folder / "shard_00000.docs.npy", folder / names[1])
        shards.append(ShardInfo(*names, 64, 16, 99, *hashes[:2]))
    tokenizer = TokenizerInfo("tokenizer.model", hashes[2])
    Manifest(1, "uint16", 6400, EOS, tokenizer, 64 * count, 16 * count, 99 * count, tuple(shards)).save(folder)


def test_ten_thousand_shards_open_and_read_in_constant_memory(tmp_path, monkeypatch):
    make_many_shards(tmp_path / "train", 10_000)
    monkeypatch.setattr(shards, "raise_open_files", lambda: 256)
    began = time.perf_counter()
    reader = ShardReader(tmp_path / "train")
    print(f"opened 10,000 shards in {time.perf_counter() - began:.2f} s")
    maps = Path("/proc/self/maps")
    reader.read(0, 64 * 200)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for start in range(0, 64 * 9_900, 64 * 11 - 5):
        assert reader.read(start, 64)[(-start) % 4 + 1] == 8 and len(reader.document_starts(start, 64)) == 16
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 200_000
    if maps.exists():
        assert maps.read_text().count(str(tmp_path)) <= 128
    assert psutil.Process().num_fds() < 500


def test_files_are_opened_when_read_and_then_stay_open(tmp_path, monkeypatch):
    make_many_shards(tmp_path / "train", 300)
    opened = []

    def count(function):
        return lambda path, *args: (opened.append(path.name), function(path, *args))[1]

    monkeypatch.setattr(shards, "check_array_file", count(shards.check_array_file))
    monkeypatch.setattr(shards, "map_array_file", count(shards.map_array_file))
    readers = [ShardReader(tmp_path / "train", check=False) for _ in range(4)]
    assert opened == []
    for rank, reader in enumerate(readers):
        reader.check_files(rank, 4, lists=rank == 0)
    assert sorted(opened) == sorted(name for shard in readers[0].manifest.shards for name in shard.files)
    opened.clear()
    for _ in range(2):
        for start in range(0, 64 * 299, 64):
            readers[0].read(start, 65)
    assert len(opened) == len(set(opened)) == 300, "a window opens its file again"
    (tmp_path / "train" / readers[0].manifest.shards[7].file).unlink()
    with pytest.raises(ShardError, match="is missing"):
        readers[0].check_files(0, 4, lists=True)  # by the listing of the folder: not one of its own
    readers[0].check_files(0, 4, lists=False)
    with pytest.raises(ShardError, match="is missing"):
        readers[3].check_files(3, 4, lists=False)
