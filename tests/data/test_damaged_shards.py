"""Damaged shards and manifests are named in one line, at once or by `verify`."""

import json
import os

import pytest
from shard_folders import make_documents, write, write_by_hand

from minimind.data.manifest import Manifest, ShardError
from minimind.data.shards import ShardReader, verify


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
