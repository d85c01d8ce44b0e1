"""What a prepared corpus holds: every document in order, the same bytes with any number of workers."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
from prepared_corpus import Prepare, interrupt_at, make_texts, read_both, read_folder, read_texts, write_jsonl

from data_prep.writing.digests import DigestSet
from data_prep.writing.pool import map_ordered
from minimind.data.shards import ShardReader, find_split, open_split, verify
from minimind.errors import UserError


def test_corpus_holds_every_document_in_order(tmp_path: Path, prepare: Prepare) -> None:
    texts = make_texts(300)
    prepare(
        tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", texts[:200]), write_jsonl(tmp_path / "b.jsonl", texts[200:])
    )
    train, val = read_texts(tmp_path / "out" / "train"), read_texts(tmp_path / "out" / "val")
    assert train == [text for text in texts if text in set(train)]
    assert sorted(train + val) == sorted(texts)
    assert 10 < len(val) < 60
    manifest = verify(tmp_path / "out" / "train")
    assert manifest.total_documents == len(train) and len(manifest.shards) > 1
    assert manifest.total_bytes == sum(len(text.encode()) for text in train)
    corpus = json.loads((tmp_path / "out" / "corpus.json").read_text())
    assert corpus["splits"]["val"]["documents"] == len(val)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"train", "val", "corpus.json"}


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path, prepare: Prepare) -> None:
    rng = random.Random(0)
    texts = make_texts(3000)
    lines = [json.dumps({"text": text}) for text in texts + texts[:50]]
    lines[100] = "broken"
    rng.shuffle(lines)
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_text("\n\n".join(make_texts(2000, seed=1)))
    inputs = [f"{tmp_path}/*.jsonl", tmp_path / "b.txt"]
    for workers in (1, 2, 3):
        prepare(tmp_path / f"out{workers}", *inputs, workers=workers, dedup=True)
    assert "bad_documents.txt" in read_folder(tmp_path / "out1")
    assert read_folder(tmp_path / "out1") == read_folder(tmp_path / "out2") == read_folder(tmp_path / "out3")


def test_split_is_a_function_of_the_document(tmp_path: Path, prepare: Prepare) -> None:
    texts = make_texts(400)
    prepare(tmp_path / "one", write_jsonl(tmp_path / "one.jsonl", texts[:200]))
    prepare(tmp_path / "two", write_jsonl(tmp_path / "two.jsonl", [*reversed(texts)]))
    prepare(tmp_path / "more", tmp_path / "two.jsonl", val_fraction=0.3)
    one, two, more = (set(read_texts(tmp_path / name / "val")) for name in ("one", "two", "more"))
    assert one == two & set(texts[:200])
    assert two < more


def test_without_validation_there_is_no_split(tmp_path: Path, prepare: Prepare) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(20))
    prepare(tmp_path / "out", source, val_fraction=0)
    assert find_split(tmp_path / "out", "val") is None
    # A fraction so small that no document falls into it leaves no empty split either.
    prepare(tmp_path / "tiny", source, val_fraction=1e-9)
    assert find_split(tmp_path / "tiny", "val") is None and not (tmp_path / "tiny" / "val").exists()


def test_dedup_drops_exact_repeats_alone(tmp_path: Path, prepare: Prepare, small_chunks: None) -> None:
    texts = make_texts(200)
    repeated = texts + texts[::3] + [texts[0] + " ", texts[0], texts[0]]
    random.Random(1).shuffle(repeated)
    source = write_jsonl(tmp_path / "a.jsonl", repeated)
    prepare(tmp_path / "all", source)
    prepare(tmp_path / "once", source, dedup=True)
    assert sorted(read_both(tmp_path / "all")) == sorted(repeated)
    assert sorted(read_both(tmp_path / "once")) == sorted({*repeated})
    assert read_texts(tmp_path / "once" / "train") == list(dict.fromkeys(read_texts(tmp_path / "all" / "train")))


def test_digest_set_agrees_with_a_set() -> None:
    rng = random.Random(0)
    ours, reference = DigestSet(), set()
    for _ in range(200):
        # Few values, with zero bytes at the end and at the start: numpy's strings drop the former.
        batch = [bytes([rng.randrange(3)]) + bytes(13) + bytes(rng.choices([0, 1, 255], k=2)) for _ in range(20)]
        expected = []
        for digest in batch:
            expected.append(digest not in reference)
            reference.add(digest)
        assert ours.add(b"".join(batch)).tolist() == expected
        assert len(ours) == len(reference)
    assert ours.add(b"").tolist() == []


def test_special_text_is_a_token_or_plain(tmp_path: Path, prepare: Prepare) -> None:
    text = "<|im_start|>user\nhello<|im_end|>"
    source = write_jsonl(tmp_path / "a.jsonl", [text])
    prepare(tmp_path / "special", source, val_fraction=0)
    prepare(tmp_path / "plain", source, val_fraction=0, special_text="plain")
    special, plain = (open_split(tmp_path / name, "train") for name in ("special", "plain"))
    assert special.read(0, 1).tolist() == [1] and special.num_tokens < plain.num_tokens
    assert not {1, 2} & set(plain.read(0, plain.num_tokens).tolist())
    assert read_texts(tmp_path / "special" / "train") == read_texts(tmp_path / "plain" / "train") == [text]


def test_bad_documents_are_counted_listed_and_left_out(tmp_path: Path, prepare: Prepare) -> None:
    texts = make_texts(100)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    with source.open("a") as file:
        file.write('broken\n{"body": ""}\n')
    prepare(tmp_path / "out", source, max_bad_fraction=0.05)
    assert sorted(read_both(tmp_path / "out")) == sorted(texts)
    listed = (tmp_path / "out" / "bad_documents.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in listed] == [f"{source}:101", f"{source}:102"]
    assert json.loads((tmp_path / "out" / "corpus.json").read_text())["bad_documents"] == 2


def test_too_many_bad_documents_leave_nothing(tmp_path: Path, prepare: Prepare) -> None:
    source = tmp_path / "a.jsonl"
    write_jsonl(source, make_texts(50))
    with source.open("a") as file:
        file.write("broken\n")
    result = prepare.run(tmp_path / "out", source, workers=2)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"the first is {source}:51: broken JSON" in errors[0]
    assert not (tmp_path / "out").exists()
    prepare(tmp_path / "out", source, max_bad_fraction=0.02)
    assert len(read_both(tmp_path / "out")) == 50


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"val_fraction": 1.0}, "--val-fraction: 1.0 is not a finite number of 0 or more and below 1"),
        ({"tokenizer": "/nowhere"}, "tokenizer"),
        ({"text_field": "body"}, "max-bad-fraction"),
        ({"inputs": ["absent.jsonl"]}, "does not exist"),
        ({"inputs": ["{tmp}/empty.jsonl"]}, "no document for the training split"),
        ({"output": "{tmp}/a.jsonl/out"}, "cannot write.*: Not a directory; choose another --output"),
        ({"shard_tokens": 0}, "--shard-tokens: 0 is not a finite number of 1 or more"),
        ({"workers": -1}, "--workers -1: must be at least 1"),
        ({"max_bad_fraction": -1}, "--max-bad-fraction: -1.0 is not a number from 0 to 1"),
        ({"max_bad_fraction": 2}, "--max-bad-fraction: 2.0 is not a number from 0 to 1"),
        ({"max_document_bytes": -5}, "--max-document-bytes: -5 is not a number from 1 to 2"),
        ({"max_tokens": 0}, "--max-tokens: 0 is not a finite number of 1 or more"),
        ({"eos_token": "<stop>"}, r"no special token <stop> to end documents: choose with --eos-token among <\|end"),
        ({"val_input": "{tmp}/a.jsonl", "val_fraction": 0.1}, "--val-input exclude each other"),
        ({"output": "{tmp}/a.jsonl"}, "a.jsonl is a file: give the name of a folder"),
    ],
)
def test_mistakes_are_user_errors_and_leave_nothing(
    tmp_path: Path, prepare: Prepare, flags: dict[str, object], message: str
) -> None:
    write_jsonl(tmp_path / "a.jsonl", make_texts(3))
    (tmp_path / "empty.jsonl").write_text("\n\n")
    flags = dict(flags)
    inputs = [str(word).format(tmp=tmp_path) for word in flags.pop("inputs", ["{tmp}/a.jsonl"])]  # type: ignore[attr-defined]
    flags = {name: value.format(tmp=tmp_path) if isinstance(value, str) else value for name, value in flags.items()}
    output = Path(str(flags.pop("output", tmp_path / "out")))
    with pytest.raises(UserError, match=message) as caught:
        prepare(output, *inputs, **flags)
    assert "\n" not in str(caught.value)
    assert {file.name for file in tmp_path.iterdir()} == {"a.jsonl", "empty.jsonl"}


def test_an_own_validation_file(tmp_path: Path, prepare: Prepare) -> None:
    texts = make_texts(60)
    source = write_jsonl(tmp_path / "a.jsonl", texts[:50])
    val = write_jsonl(tmp_path / "v.jsonl", texts[40:])
    prepare(tmp_path / "out", source, val_input=val, val_fraction=0)
    assert read_texts(tmp_path / "out" / "train") == texts[:50]
    assert read_texts(tmp_path / "out" / "val") == texts[40:]
    # Without repeats a document of both is left to validation.
    prepare(tmp_path / "once", source, val_input=val, val_fraction=0, dedup=True)
    assert read_texts(tmp_path / "once" / "train") == texts[:40]
    with pytest.raises(UserError, match="twice"):
        prepare(tmp_path / "same", source, val_input=source, val_fraction=0)
    with pytest.raises(UserError, match=f"in place of {val}"):
        prepare(tmp_path / "out", val, val_input=source, val_fraction=0)


def test_a_part_of_the_inputs(
    tmp_path: Path, prepare: Prepare, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = make_texts(500)
    source, other = write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "b.jsonl"
    write_jsonl(other, make_texts(5, seed=1))
    prepare(tmp_path / "documents", source, other, max_documents=120)
    assert set(read_both(tmp_path / "documents")) == set(texts[:120])
    prepare(tmp_path / "bytes", source, max_bytes=10_000)
    size = sum(len(text.encode()) for text in read_both(tmp_path / "bytes"))
    assert 10_000 <= size < 10_500
    flags = {"max_tokens": 15_000}
    prepare(tmp_path / "tokens", source, **flags)
    corpus = json.loads((tmp_path / "tokens" / "corpus.json").read_text())
    assert 15_000 <= sum(split["tokens"] for split in corpus["splits"].values()) < 15_300
    for chunk in range(0, 20, 4):
        output = tmp_path / f"out{chunk}"
        with monkeypatch.context() as patch:
            interrupt_at(patch, chunk)
            with pytest.raises(KeyboardInterrupt):
                prepare(output, source, **flags)
        prepare(output, source, **flags)
        assert read_folder(output) == read_folder(tmp_path / "tokens")
    # What comes after the limit was never read, and may be anything.
    prepare(tmp_path / "documents", source, source.parent / "b.jsonl", max_documents=120)
    other.write_text("other")
    prepare(tmp_path / "documents", source, max_documents=120)


def test_documents_without_tokens_are_bad(
    tmp_path: Path, prepare: Prepare, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=200, special_tokens=["</s>"], show_progress=False)
    texts = [text for text in make_texts(300) if text.isascii()]
    model.train_from_iterator(texts, trainer)
    model.save(str(tmp_path / "tokenizer.json"))
    lines = [text for text in texts for text in (text, "你好")]
    source = write_jsonl(tmp_path / "a.jsonl", lines)
    flags = {"tokenizer": tmp_path / "tokenizer.json", "max_bad_fraction": 0.6, "shard_tokens": 500}
    result = prepare.run(tmp_path / "out", source, **flags)
    assert result.returncode == 0 and "changes or drops some characters" in result.stderr
    problems = (tmp_path / "out" / "bad_documents.txt").read_text().splitlines()
    assert problems[0] == f"{source}:2: the tokenizer has no token for anything in it" and len(problems) == len(texts)
    manifests = [ShardReader(tmp_path / "out" / split).manifest for split in ("train", "val")]
    assert sum(manifest.total_documents for manifest in manifests) == len(texts)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "again", source, **flags)
    prepare(tmp_path / "again", source, **flags)
    assert read_folder(tmp_path / "again") == read_folder(tmp_path / "out")


def test_data_set_folder_through_datasets(tmp_path: Path, prepare: Prepare) -> None:
    texts = make_texts(100)
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", texts)
    prepare(tmp_path / "out", f"hf:{tmp_path}/set")
    prepare(tmp_path / "whole", tmp_path / "set" / "train.jsonl")
    assert read_texts(tmp_path / "out" / "train") == read_texts(tmp_path / "whole" / "train")
    assert read_texts(tmp_path / "out" / "val") == read_texts(tmp_path / "whole" / "val")


def test_huggingface_tokenizer_prepares_a_corpus(tmp_path: Path, prepare: Prepare) -> None:
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = make_texts(200)
    model.train_from_iterator(texts, trainer)
    model.save(str(tmp_path / "tokenizer.json"))
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    for workers in (1, 2):
        prepare(tmp_path / f"out{workers}", source, tokenizer=tmp_path / "tokenizer.json", workers=workers)
    assert read_folder(tmp_path / "out1") == read_folder(tmp_path / "out2")
    assert (tmp_path / "out1" / "val" / "tokenizer.json").exists()
    assert sorted(read_both(tmp_path / "out1")) == sorted(texts)


def test_a_worker_that_dies_is_a_user_error() -> None:
    with pytest.raises(UserError, match="worker process died"):
        list(map_ordered(os._exit, [3, 3, 3], workers=2))


def test_results_come_in_order_and_few_items_are_taken_ahead() -> None:
    taken = []

    def items() -> Iterator[int]:
        for i in range(100):
            taken.append(i)
            yield i

    results = map_ordered(abs, items(), workers=2)
    assert next(results) == 0
    assert len(taken) <= 6
    assert list(results) == list(range(1, 100))
    results.close()
