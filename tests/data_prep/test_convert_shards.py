"""Token files of other programs, against files that their own code has written.

`foreign_tokens/` was made of its texts.jsonl and tokenizer.json (290 tokens), an end token after each document:
megatron_*.bin and .idx by `IndexedDatasetBuilder` of NVIDIA/Megatron-LM at d98e8a64 (gpt-neox's
`MMapIndexedDatasetBuilder` at ea7aefd8 gives the same bytes), 00000_unshuffled.ds* by tools/preprocess_data.py of
huggingface/nanotron at 2411b022 with datatrove 0.10.1.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from prepared_corpus import Prepare, read_folder, read_texts

from data_prep.convert_shards import main
from data_prep.verify_shards import verify_corpus
from minimind.errors import UserError

FOREIGN = Path(__file__).parent / "foreign_tokens"
NANOSET, MEGATRON = FOREIGN / "00000_unshuffled.ds", FOREIGN / "megatron_uint16"
SHARD_TOKENS = 300


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch):
    def run(output: Path, *inputs: Path, **flags: object) -> None:
        words = ["--input", *map(str, inputs), "--output", str(output)]
        for name, value in flags.items():
            name = name.replace("_", "-")
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        monkeypatch.setattr(sys, "argv", ["convert_shards", *words])
        main()

    return run


@pytest.fixture
def ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same texts, prepared here."""
    prepare = Prepare(FOREIGN / "tokenizer.json", monkeypatch)
    prepare(tmp_path / "ours", FOREIGN / "texts.jsonl", val_fraction=0, shard_tokens=SHARD_TOKENS)
    (tmp_path / "ours/corpus.json").unlink()
    return tmp_path / "ours"


@pytest.mark.parametrize("source", [NANOSET, MEGATRON, FOREIGN / "megatron_int32.bin"], ids=lambda path: path.name)
def test_their_files_are_our_shards(source: Path, ours: Path, tmp_path: Path, convert) -> None:
    """Tokens, documents, counts of bytes and hashes: as if the text had been prepared here."""
    convert(tmp_path / "out", source, tokenizer=FOREIGN / "tokenizer.json", shard_tokens=SHARD_TOKENS)
    assert read_folder(tmp_path / "out") == read_folder(ours)
    assert len(list(ours.glob("train/shard_*.docs.npy"))) == 3
    verify_corpus(tmp_path / "out")


def test_our_shards_are_their_files(ours: Path, tmp_path: Path, convert) -> None:
    """Byte for byte, where the whole corpus is one shard as it is one file there."""
    convert(tmp_path / "megatron", ours, to="megatron")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"megatron/train{suffix}").read_bytes() == MEGATRON.with_suffix(suffix).read_bytes()
    convert(tmp_path / "one", MEGATRON, tokenizer=FOREIGN / "tokenizer.json")
    convert(tmp_path / "nanoset", tmp_path / "one", to="nanoset")
    for name in (".ds", ".ds.index", ".ds.metadata"):
        file = f"00000_unshuffled{name}"
        assert (tmp_path / "nanoset/train" / file).read_bytes() == (FOREIGN / file).read_bytes()
    # And back: several files, a folder of them, both splits.
    convert(tmp_path / "nanoset3", ours, to="nanoset")
    folder = tmp_path / "nanoset3/train"
    assert len(list(folder.glob("*.ds"))) == 3
    flags = {"tokenizer": tmp_path / "nanoset3", "shard_tokens": SHARD_TOKENS}
    convert(tmp_path / "back", folder, val_input=folder / "00001_unshuffled.ds", **flags)
    assert read_folder(tmp_path / "back/train") == read_folder(ours / "train")
    assert read_texts(tmp_path / "back/val")[0] in read_texts(ours / "train")
    convert(tmp_path / "both", tmp_path / "back", to="megatron")
    assert {path.name for path in (tmp_path / "both").iterdir()} == {
        "tokenizer.json", "train.bin", "train.idx", "val.bin", "val.idx",
    }  # fmt: skip


def test_documents_of_several_sequences_and_without_end_tokens(tmp_path: Path, convert) -> None:
    """As Megatron's own tools leave them: sentences of a document, files merged, no end token."""
    tokens = np.fromfile(MEGATRON.with_suffix(".bin"), "<u2")
    ends = np.flatnonzero(tokens == 0)[:3]
    documents = [part[part > 0] for part in np.split(tokens[: ends[-1] + 1], ends[:-1] + 1)]
    pieces = [documents[0][:2], documents[0][2:], documents[1], documents[2]]
    np.concatenate(documents).astype("<i4").tofile(tmp_path / "a.bin")

    def write_index(marks: list[int]) -> None:
        sizes = np.array([len(piece) for piece in pieces])
        header = b"MMIDIDX\0\0" + np.array([1], "<u8").tobytes() + b"\4" + np.array([4, len(marks)], "<u8").tobytes()
        offsets = 4 * (np.cumsum(sizes) - sizes)
        parts = [sizes.astype("<i4"), offsets.astype("<i8"), np.array(marks, "<i8")]
        (tmp_path / "a.idx").write_bytes(header + b"".join(part.tobytes() for part in parts))

    write_index([0, 2, 3, 4])
    flags = {"tokenizer": FOREIGN / "tokenizer.json"}
    with pytest.raises(UserError, match=r"a\.bin: document 0 does not end with <\|endoftext\|> \(0\)"):
        convert(tmp_path / "out", tmp_path / "a.bin", **flags)
    assert not list(tmp_path.glob("out*"))
    convert(tmp_path / "out", tmp_path / "a.bin", add_end_tokens=True, **flags)
    convert(tmp_path / "whole", MEGATRON, **flags)
    assert read_texts(tmp_path / "out/train") == read_texts(tmp_path / "whole/train")[:3]
    write_index([0])  # gpt-neox's merge keeps no document marks
    convert(tmp_path / "merged", tmp_path / "a.idx", add_end_tokens=True, **flags)
    assert len(read_texts(tmp_path / "merged/train")) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f("a.bin", lambda data: data[:-2]), r"a\.bin has 1,614 bytes, and its index says 1,616"),
        (lambda f: f("a.idx", lambda data: data[:-8]), r"a\.idx has 834 bytes, 842"),
        (lambda f: f("a.idx", lambda data: data + bytes(40)), "modes of a multimodal"),
        (lambda f: f("a.idx", lambda data: b"X" + data[1:]), "does not begin with MMIDIDX"),
        (lambda f: f("a.idx", lambda data: data[:17] + b"\6" + data[18:]), "type 6 are not those of tokens"),
        (lambda f: f("a.idx", lambda data: data[:34] + b"\x09" + data[35:]), "do not follow one another"),
        (lambda f: f("a.bin", lambda data: b"\xff\xff" + data[2:]), "token id 65535; the vocabulary has 290"),
        (lambda f: f("b.ds", lambda data: data[:-1]), r"b\.ds has 1,615 bytes"),
        (lambda f: f("b.ds.index", lambda data: data[:-3]), r"b\.ds\.index is damaged"),
        (lambda f: f("b.ds.index", lambda data: data[8:16] + data[:8] + data[16:]), "do not increase"),
        (lambda f: f("b.ds.loss", None), "has a loss mask"),
    ],
)
def test_a_damaged_file_is_one_line_and_leaves_nothing(tmp_path: Path, convert, change, message: str) -> None:
    for name, source in {"a.bin": MEGATRON, "a.idx": MEGATRON, "b.ds": NANOSET, "b.ds.index": NANOSET}.items():
        suffix = name[1:] if source is MEGATRON else name.removeprefix("b.ds")
        shutil.copy(f"{source}{suffix}", tmp_path / name)
    changed: list[str] = []

    def edit(name: str, function) -> None:
        path = tmp_path / name
        path.write_bytes(function(path.read_bytes()) if function else b"")
        changed.append(name)

    change(edit)
    source = tmp_path / ("a.bin" if changed[0].startswith("a") else "b.ds")
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "out", source, tokenizer=FOREIGN / "tokenizer.json")
    assert not list(tmp_path.glob("out*"))


def test_what_cannot_be_converted_is_refused(ours: Path, tmp_path: Path, convert) -> None:
    with pytest.raises(UserError, match=r"no \.bin or \.ds file"):
        convert(tmp_path / "out", FOREIGN / "texts.jsonl", tokenizer=FOREIGN / "tokenizer.json")
    with pytest.raises(UserError, match="--tokenizer: not given"):
        convert(tmp_path / "out", MEGATRON)
    with pytest.raises(UserError, match="--overwrite to replace"):
        convert(ours, MEGATRON, tokenizer=FOREIGN / "tokenizer.json")
    with pytest.raises(UserError, match="give one corpus folder"):
        convert(tmp_path / "out", ours, ours, to="nanoset")
    assert not list(tmp_path.glob("out*"))
