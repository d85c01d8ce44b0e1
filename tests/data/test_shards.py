"""Token shards: round trips, damage, interruption, size."""

import json
import os
import resource
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from repository import ROOT
from shard_folders import EOS, make_documents, open_writer, stream_of, write

from minimind.data.array_file import npy_header
from minimind.data.manifest import Manifest, ShardError, ShardInfo, TokenizerInfo
from minimind.data.shards import ShardReader, find_split, open_split, verify
from minimind.errors import UserError
from minimind.files import disk_errors, hash_file

# Processes of their own find the helpers of the tests too.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "support")}


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"a tokenizer")
    return path


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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


# --- interruption -----------------------------------------------------------------------------------------------------


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
    with pytest.raises(UserError, match="cannot write /proc/minimind"), disk_errors(Path("/proc/minimind/train")):
        open_writer(Path("/proc/minimind/train"), tokenizer_file)


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shard_00002.npy", "shard_00002.docs.npy"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "longer", "no header", "empty"])
def test_a_file_of_the_wrong_size_is_refused_at_once(tmp_path, tokenizer_file, name, damage):
    write(tmp_path / "train", tokenizer_file, make_documents())
    path = tmp_path / "train" / name
    content = path.read_bytes()
    damaged = {"truncated": content[:-1], "longer": content + b"\0", "no header": bytes(len(content)), "empty": b""}
    path.unlink() if damage == "missing" else path.write_bytes(damaged[damage])
    with pytest.raises(ShardError, match=name.replace(".", r"\.")) as caught:
        ShardReader(tmp_path / "train")
    assert "\n" not in str(caught.value)


def test_a_file_cut_after_opening_raises_instead_of_killing(tmp_path, tokenizer_file):
    manifest = write(tmp_path / "train", tokenizer_file, make_documents())
    reader = ShardReader(tmp_path / "train")
    os.truncate(tmp_path / "train" / manifest.shards[0].file, 100)
    with pytest.raises(ShardError, match="damaged"):
        reader.read(0, 50)


@pytest.mark.parametrize("name", ["shard_00002.npy", "shard_00002.docs.npy", "tokenizer.model"])
def test_one_flipped_bit_is_found_by_verify(tmp_path, tokenizer_file, name):
    write(tmp_path / "train", tokenizer_file, make_documents())
    path = tmp_path / "train" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShardError, match=rf"{name} is damaged: its sha256"):
        verify(tmp_path / "train")


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


@pytest.mark.parametrize(
    ("tokens", "starts", "said"),
    [
        ([5, 0, 10, 0], [0, 2], "token id 10; the vocabulary ends at 10"),
        ([5, 0, 6, 0], [1, 2], "begins at 1"),
        ([5, 0, 6, 0], [0, 0], "do not increase"),
        ([5, 0, 6, 0], [0, 3], "document 0 does not end with token 0"),
        ([5, 0, 6, 6], [0, 2], "document 1 does not end with token 0"),
        ([5, 0, 6, 0], [0, 9], "do not increase"),
        ([5, 0, 6, 0], [0, -2], "do not increase"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2, 3, 1000])
def test_contents_that_cannot_be_are_found_by_verify(tmp_path, monkeypatch, tokens, starts, said, chunk):
    monkeypatch.setattr("minimind.data.shards._VERIFY_CHUNK", chunk)
    write_by_hand(tmp_path / "train", tokens, starts)
    with pytest.raises(ShardError, match=said):
        verify(tmp_path / "train")


@pytest.mark.parametrize("chunk", [1, 2, 3, 1000])
def test_verify_accepts_what_is_right_and_counts_shards(tmp_path, tokenizer_file, monkeypatch, chunk):
    monkeypatch.setattr("minimind.data.shards._VERIFY_CHUNK", chunk)
    write_by_hand(tmp_path / "train", [5, 0, 6, 0], [0, 2])
    assert verify(tmp_path / "train").total_documents == 2
    manifest = write(tmp_path / "val", tokenizer_file, make_documents())
    calls = []
    verify(tmp_path / "val", on_shard=lambda: calls.append(1))
    assert len(calls) == len(manifest.shards)


# --- the manifest -----------------------------------------------------------------------------------------------------

WRONG_FIELDS = [
    ("format_version", 3, "format_version is 3"),
    ("dtype", "int64", "dtype is 'int64'"),
    ("dtype", ["uint16"], "dtype"),
    ("vocab_size", 0, "vocab_size is 0"),
    ("vocab_size", 70_000, "at most 65536"),
    ("vocab_size", True, "vocab_size is True"),
    ("vocab_size", "6400", "vocab_size is '6400'"),
    ("eos_token_id", 6400, "eos_token_id is 6400"),
    ("eos_token_id", None, "eos_token_id is None"),
    ("tokenizer", None, "tokenizer is None"),
    ("tokenizer.file", "../../etc/passwd", "plain name of a file"),
    ("tokenizer.file", "..", "plain name of a file"),
    ("tokenizer.sha256", "abc", "tokenizer.sha256 is 'abc'"),
    ("total_tokens", 1, "total_tokens is 1"),
    ("total_documents", 1.0, "total_documents is 1.0"),
    ("total_bytes", -1, "total_bytes is -1"),
    ("shards", {}, "shards Input should be a valid array"),
    ("shards.0", 5, r"shards\[0\] is 5"),
    ("shards.0.file", "a/b.npy", r"shards\[0\].file"),
    ("shards.1.file", "shard_00000.npy", "shard_00000.npy twice; every file must be named once"),
    ("shards.0.documents_file", 3, r"shards\[0\].documents_file is 3"),
    ("shards.0.tokens", 0, r"shards\[0\].tokens is 0"),
    ("shards.0.documents", 10**6, r"shards\[0\] documents is 1000000"),
    ("shards.0.bytes", "1", r"shards\[0\].bytes"),
    ("shards.0.sha256", "X" * 64, r"shards\[0\].sha256"),
    ("shards.0.documents_sha256", None, r"shards\[0\].documents_sha256"),
    ("extra", 1, "extra is unknown"),
    ("shards.0.extra", 1, r"shards\[0\].extra is unknown"),
]


@pytest.mark.parametrize(("field", "value", "said"), WRONG_FIELDS)
def test_a_wrong_manifest_field_is_named(tmp_path, tokenizer_file, field, value, said):
    manifest = write(tmp_path / "train", tokenizer_file, make_documents())
    fields = json.loads((tmp_path / "train" / "manifest.json").read_text())
    owner, *path = fields, *field.split(".")
    for key in path[:-1]:
        owner = owner[int(key) if isinstance(owner, list) else key]
    owner[int(path[-1]) if isinstance(owner, list) else path[-1]] = value
    (tmp_path / "train" / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises(ShardError, match=said) as caught:
        Manifest.load(tmp_path / "train")
    assert str(caught.value).startswith(str(tmp_path / "train" / "manifest.json")) and "\n" not in str(caught.value)
    assert manifest  # the writer's own was right


@pytest.mark.parametrize("field", [name for name in Manifest.__dataclass_fields__ if not hasattr(Manifest, name)])
def test_a_missing_manifest_field_is_named(tmp_path, tokenizer_file, field):
    write(tmp_path / "train", tokenizer_file, make_documents(3))
    fields = json.loads((tmp_path / "train" / "manifest.json").read_text())
    del fields[field]
    (tmp_path / "train" / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises(ShardError, match=f"{field} is missing"):
        ShardReader(tmp_path / "train")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"", b"[]", b"null"])
def test_a_broken_manifest_is_one_line(tmp_path, tokenizer_file, content):
    write(tmp_path / "train", tokenizer_file, make_documents(3))
    (tmp_path / "train" / "manifest.json").write_bytes(content)
    with pytest.raises(ShardError, match=r"manifest\.json") as caught:
        ShardReader(tmp_path / "train")
    assert "\n" not in str(caught.value)


# --- splits -----------------------------------------------------------------------------------------------------------


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


# --- size -------------------------------------------------------------------------------------------------------------


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


def test_ten_thousand_shards_open_and_read_in_constant_memory(tmp_path):
    make_many_shards(tmp_path / "train", 10_000)
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
    assert len(os.listdir("/proc/self/fd")) < 500 or resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 10**5


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
