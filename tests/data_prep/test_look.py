"""python -m minimind.data look: what a person reads of a corpus is what a model is trained on."""

import re
from pathlib import Path

import numpy as np
import pytest
from prepared_corpus import Prepare, make_texts, write_jsonl

from minimind.data.__main__ import main
from minimind.data.dataset import load_shards
from minimind.data.shard_writer import ShardWriter
from minimind.data.shards import open_split
from minimind.data.tokenizer import load_tokenizer
from minimind.errors import UserError


def test_a_corpus_is_shown_as_it_is(tmp_path: Path, prepare: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write_jsonl(tmp_path / f"{n}.jsonl", make_texts(100 * n, seed=n)) for n in (1, 2)]
    hostile = write_jsonl(tmp_path / "3.jsonl", ["a \x1b[31m b"])
    prepare(tmp_path / "out", files[0], shard_tokens=1500)
    prepare(tmp_path / "out", files[1], hostile, append=True, shard_tokens=1500)
    capsys.readouterr()
    main(["look", str(tmp_path / "out"), "--documents", "400", "--longest", "1000", "--seq-len", "64"])
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and r"\x1b" in shown
    reader, tokenizer = open_split(tmp_path / "out", "train"), load_tokenizer(tmp_path / "out/train")
    # Each source by itself, from its own corpus.
    for file in files:
        prepare(tmp_path / file.stem, file)
        alone = open_split(tmp_path / file.stem, "train").manifest
        row = rf"{alone.total_tokens:,} +{alone.total_documents:,} +{alone.bytes_per_token:.3f}  {file}"
        assert re.search(row, shown)
    # All documents, token by token.
    documents = re.split(r"\u2500+ document .*\n", shown.split("\nwindow ")[0])[1:]
    assert len(documents) == reader.manifest.total_documents
    ends = [*reader.document_starts(0, reader.num_tokens)[1:], reader.num_tokens]
    texts = [tokenizer.decode(part) for part in np.split(reader.read(0, reader.num_tokens), ends[:-1])]
    for found, text in zip(documents, texts, strict=True):
        data = found.rstrip("\n").replace("|", "").replace("\\n\n", "\n").replace("\\x1b", "\x1b").encode()
        data = re.sub(rb"<([0-9a-f]{2})>", lambda match: bytes.fromhex(match[1].decode()), data)
        assert data.decode() == text.replace("|", "")
    counts = np.bincount(reader.read(0, reader.num_tokens))
    assert f"{counts.max() / reader.num_tokens:.2%}  {counts.argmax()}" in shown


def test_a_window_has_its_borders_and_targets(
    tmp_path: Path, prepare: Prepare, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", make_texts(100)))
    dataset = load_shards(tmp_path / "out", seq_len=96, document_mask=True)
    index = next(i for i in range(len(dataset)) if len(dataset[i].document_starts) == 3)
    capsys.readouterr()
    main(["look", str(tmp_path / "out"), "--window", str(index), "--seq-len", "96", "--documents", "0"])
    window = capsys.readouterr().out.split("\nwindow ")[1]
    assert window.startswith(f"{index} of {len(dataset)}: 96 positions, ") and "borders of documents: 3" in window
    starts = re.findall(r"from position (\d+)\n(\(.*?\))?", window)
    assert [int(start) for start, _ in starts] == [0, *dataset[index].document_starts.tolist()]
    assert all(first for _, first in starts), "a document's first token is no target"
    sample = dataset[index]
    rows = re.findall(r"^ +(\d+) +(\d+)  \".*?\" +(\d+|-)  ", window, re.M)
    assert [(int(i), int(a), int(b)) for i, a, b in rows] == [
        (i, sample.input_ids[i], sample.labels[i]) for i in range(12) if sample.labels[i] >= 0
    ] and len(rows) > 8
    # Of a conversation, what is trained alone is in colour.
    tokenizer = load_tokenizer(tokenizer_folder)
    question, answer = tokenizer.encode("the cat"), tokenizer.encode(" sat on")
    with ShardWriter(
        tmp_path / "chat",
        vocab_size=tokenizer.vocab_size,
        eos_token_id=0,
        tokenizer_file=tokenizer.file,
        chat_template="{{ messages }}",
    ) as writer:
        writer.add_document(
            np.array(question + answer), 14, np.array([0] * len(question) + [1] * len(answer), dtype=np.uint8)
        )
    main(["look", str(tmp_path / "chat"), "--seq-len", "32", "--colour", "always"])
    document = capsys.readouterr().out.split("document 0")[1].split("window")[0]
    dim = "".join(re.findall(r"\x1b\[2m(.*?)\x1b", document))
    bright = "".join(re.findall(r"\x1b\[30;48.*?m(.*?)\x1b", document))
    assert (dim, bright) == ("the cat<|endoftext|>", " sat on")


def test_what_cannot_be_shown_is_one_line(tmp_path: Path, prepare: Prepare) -> None:
    prepare(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", make_texts(30)), val_fraction=0)
    for flags, message in [
        (["--window", "1000000"], "--window 1000000: the last one"),
        (["--split", "val"], "has no val split; it has train"),
        (["--documents", "-1"], "--documents"),
        (["--seq-len", "1000000"], "lower --seq-len"),
    ]:
        with pytest.raises(UserError, match=message):
            main(["look", str(tmp_path / "out"), *flags])
