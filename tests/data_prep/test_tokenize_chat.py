"""Conversations as shards: the same bytes whatever interrupts, targets in their place, bad ones named."""

import hashlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers_for_tests import save_byte_level, save_sentencepiece

from data_prep.reading import chunks
from data_prep.tokenize_chat import main
from minimind.data.chat_template import load_chat_template
from minimind.data.dataset import IGNORED_LABEL, PackedDataset
from minimind.data.shard_writer import ShardWriter
from minimind.data.shards import ShardError, ShardReader, verify
from minimind.data.tokenizer import Tokenizer, load_tokenizer
from minimind.errors import UserError


def conversations(count: int) -> list[dict]:
    def turn(number: int, extra: str = "") -> list[dict]:
        answer = " ".join(["- fox", "你好", "(x)"][: number % 3 + 1]) + extra
        return [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": answer}]

    return [{"messages": [m for i in range(number % 3 + 1) for m in turn(number + i)]} for number in range(count)]


@pytest.fixture(scope="module", params=[save_sentencepiece, save_byte_level], ids=["sentencepiece", "byte-level"])
def tokenizer_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return request.param(tmp_path_factory.mktemp("tokenizer"))


def run(monkeypatch: pytest.MonkeyPatch, tokenizer_file: Path, source: Path, output: Path, *flags: str) -> None:
    words = ["tokenize_chat", "--input", source, "--tokenizer", tokenizer_file, "--output", output, "--workers", 1]
    monkeypatch.setattr(sys, "argv", [*map(str, words), *flags])
    main()


def write(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def test_shards_hold_what_the_template_gives(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer_file: Path
) -> None:
    records = conversations(30)
    records[7]["tools"] = [{"type": "function", "function": {"name": "f", "description": "in this order"}}]
    run(monkeypatch, tokenizer_file, write(tmp_path / "in.jsonl", records), tmp_path / "out", "--val-fraction", "0")
    verify(tmp_path / "out/train")
    reader = ShardReader(tmp_path / "out/train")
    template = load_chat_template(reader_tokenizer(reader))
    bounds = [*reader.document_starts(0, reader.num_tokens), reader.num_tokens]
    assert len(bounds) == 31
    for record, start, end in zip(records, bounds[:-1], bounds[1:], strict=True):
        token_ids, targets = template.encode(record["messages"], record.get("tools"))
        assert reader.read(start, end - start).tolist() == [*token_ids, reader.manifest.eos_token_id]
        assert reader.read_targets(start, end - start).tolist() == [*targets, False]
    assert reader.manifest.total_bytes == sum(
        len(template.render(r["messages"], r.get("tools")).encode()) for r in records
    )


def reader_tokenizer(reader: ShardReader) -> Tokenizer:
    return load_tokenizer(reader.folder / reader.manifest.tokenizer.file)


def test_windows_train_the_answers_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer_file: Path) -> None:
    records = conversations(40)
    run(monkeypatch, tokenizer_file, write(tmp_path / "in.jsonl", records), tmp_path / "out", "--val-fraction", "0")
    reader = ShardReader(tmp_path / "out/train")
    dataset, tokenizer = PackedDataset(reader, 200), reader_tokenizer(reader)
    assert dataset.num_cut == 0 and 0 <= dataset.padding < 0.2
    answers = sorted(
        "".join(m["content"] + "<|im_end|>" for m in record["messages"] if m["role"] == "assistant")
        for record in records
    )
    found = []
    for index in range(len(dataset)):
        sample = dataset[index]
        assert sample.document_starts is not None
        bounds = [0, *sample.document_starts, 200]
        for start, end in itertools.pairwise(bounds):
            labels = sample.labels[start:end]
            found.append(tokenizer.decode(labels[labels != IGNORED_LABEL]))
            # What is predicted is what comes next.
            inside = labels[:-1] != IGNORED_LABEL
            assert np.array_equal(labels[:-1][inside], sample.input_ids[start + 1 : end][inside])
    assert sorted(filter(None, found)) == answers
    assert dataset.num_targets == reader.read_targets(0, reader.num_tokens).sum()


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for split in ("train", "val") for path in (folder / split).iterdir())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_bytes_do_not_depend_on_the_form_or_an_interruption(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer_file: Path
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1000)
    records = conversations(60)
    names = {"user": "human", "assistant": "gpt"}
    sharegpt = [
        {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in r["messages"]]} for r in records
    ]
    flags = ("--shard-tokens", "200", "--val-fraction", "0.2")
    run(monkeypatch, tokenizer_file, write(tmp_path / "a.jsonl", records), tmp_path / "a", *flags)
    run(monkeypatch, tokenizer_file, write(tmp_path / "b.jsonl", sharegpt), tmp_path / "b", *flags)

    add, left = ShardWriter.add_document, 30

    def stop(*args, **kwargs) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        add(*args, **kwargs)

    monkeypatch.setattr(ShardWriter, "add_document", stop)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tokenizer_file, tmp_path / "a.jsonl", tmp_path / "c", *flags)
    monkeypatch.setattr(ShardWriter, "add_document", add)
    assert list((tmp_path / "c/.partial/train").glob("shard_*.targets.npy"))
    run(monkeypatch, tokenizer_file, tmp_path / "a.jsonl", tmp_path / "c", *flags)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b") == hashes(tmp_path / "c")


def test_nothing_is_lost_when_it_is_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer_file: Path
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1000)
    source, flags = write(tmp_path / "in.jsonl", conversations(60)), ("--shard-tokens", "200", "--val-fraction", "0.2")
    run(monkeypatch, tokenizer_file, source, tmp_path / "whole", *flags)
    add = ShardWriter.add_document

    def prepare_until(left: int) -> None:
        def stop(*args, **kwargs) -> None:
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            add(*args, **kwargs)

        monkeypatch.setattr(ShardWriter, "add_document", stop)
        run(monkeypatch, tokenizer_file, source, tmp_path / "out", *flags)

    for left in (2, 9, 12, 20):
        process = multiprocessing.get_context("fork").Process(target=prepare_until, args=(left,))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    run(monkeypatch, tokenizer_file, source, tmp_path / "out", *flags)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_a_damaged_target_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer_file: Path) -> None:
    run(
        monkeypatch,
        tokenizer_file,
        write(tmp_path / "in.jsonl", conversations(9)),
        tmp_path / "out",
        "--val-fraction",
        "0",
    )
    path = tmp_path / "out/train/shard_00000.targets.npy"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"targets\.npy is damaged"):
        verify(tmp_path / "out/train")
    path.unlink()
    with pytest.raises(ShardError, match=r"targets\.npy is missing"):
        ShardReader(tmp_path / "out/train")


def test_bad_conversations_are_named_and_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    untrained = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]
    records = [*conversations(5), {"text": "a"}, {"messages": untrained}]
    source = write(tmp_path / "in.jsonl", records)
    with pytest.raises(UserError, match="2 of 7 documents are bad, above --max-bad-fraction"):
        run(monkeypatch, tokenizer_file, source, tmp_path / "out")
    run(monkeypatch, tokenizer_file, source, tmp_path / "out", "--max-bad-fraction", "0.5", "--val-fraction", "0")
    shown = capsys.readouterr()
    assert "in.jsonl:6: no conversation" in shown.err
    assert "in.jsonl:7: none of its answers is to be trained" in shown.err
    assert "2 bad, 0 empty and 0 repeated" in shown.out


def test_the_form_is_said_and_how_full_windows_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alpaca = {"instruction": "add 1 2", "output": "the lazy dog " * 400}
    source = write(tmp_path / "in.jsonl", [*conversations(600), {"instruction": "add", "output": "3"}, alpaca])
    flags = ("--val-fraction", "0", "--seq-len", "500")
    run(monkeypatch, tokenizer_file, source, tmp_path / "out", *flags)
    shown = capsys.readouterr()
    assert "read from records in the form messages (600), alpaca (2)" in shown.out
    assert re.search(r"in\.jsonl:602: message 2 has \S+ tokens, above --seq-len 500", shown.err)
    (padding,) = re.findall(r"windows of 500 tokens: (\S+)% padding, \d+ conversations cut at their end", shown.out)
    assert float(padding) < 3


def test_a_template_that_can_train_nothing_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer_file: Path
) -> None:
    copied = tmp_path / "tokenizer" / tokenizer_file.name
    copied.parent.mkdir()
    copied.write_bytes(tokenizer_file.read_bytes())
    source = write(tmp_path / "in.jsonl", conversations(5))
    opening = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    endless = opening + "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>{% endfor %}"
    changing = opening + "{{ m.content if loop.last else '...' }}<|im_end|>{% endfor %}"
    changing += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    for template, problem in (
        (endless.replace("{% generation %}", "{% if m.role == 'assistant' %}{% generation %}")
         .replace("{% endgeneration %}", "{% endgeneration %}{% else %}{{ m.content }}{% endif %}"),
         "leaves the token that closes an answer out"),
        (changing, "writes message 2 differently when others follow"),
    ):  # fmt: skip
        (copied.parent / "chat_template.jinja").write_text(template)
        with pytest.raises(UserError, match=rf"{copied.parent}: the chat template {problem}"):
            run(monkeypatch, copied, source, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_text_files_hold_no_conversations(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer_file: Path
) -> None:
    (tmp_path / "in.txt").write_text("hello")
    with pytest.raises(UserError, match=r"in\.txt is plain text: conversations are read from records"):
        run(monkeypatch, tokenizer_file, tmp_path / "in.txt", tmp_path / "out")
    assert not (tmp_path / "out").exists()
