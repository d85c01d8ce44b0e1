"""Preparing a corpus: same bytes with any number of workers, after any interruption, and never half a folder."""

import contextlib
import gzip
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers

import data_prep.reading.chunks
from data_prep.reading.records import ReadOptions
from data_prep.tokenize_corpus import main
from data_prep.train_tokenizer import cut_sentences, save_tokenizer, train_tokenizer
from data_prep.writing.corpus_folder import CorpusFolder
from data_prep.writing.corpus_writer import CorpusWriter
from data_prep.writing.digests import DigestSet
from data_prep.writing.pool import map_ordered
from minimind.data.shard_writer import ShardWriter
from minimind.data.shards import ShardReader, find_split, open_split, verify
from minimind.data.tokenizer import load_tokenizer
from minimind.errors import UserError

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "12",
    "dogs",
    "and",
    "ran",
    "你好",
    "世界",
    "<|im_start|>",
    "def",
    "f(x):",
    "\n",
    "",
]


def make_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [f"{i} " + " ".join(rng.choices(WORDS, k=rng.randrange(1, 60))) for i in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(list(cut_sentences(make_texts(100))), 320), folder, 320)
    return folder


class Prepare:
    """The command, in this process (or in its own, with `in_process=False`)."""

    def __init__(self, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._tokenizer = tokenizer_folder
        self._monkeypatch = monkeypatch

    def flags(self, output: Path, *inputs: object, **flags: object) -> list[str]:
        words = ["--input", *map(str, inputs), "--tokenizer", str(self._tokenizer), "--output", str(output)]
        for name, value in {"workers": 1, "shard-tokens": 5000, "val-fraction": 0.1, **flags}.items():
            name = name.replace("_", "-")
            words += [f"--{name}", str(value)] if not isinstance(value, bool) else [f"--{'' if value else 'no-'}{name}"]
        return words

    def __call__(self, output: Path, *inputs: object, **flags: object) -> None:
        self._monkeypatch.setattr(sys, "argv", ["tokenize_corpus", *self.flags(output, *inputs, **flags)])
        main()

    def start(self, output: Path, *inputs: object, **flags: object) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "data_prep.tokenize_corpus", *self.flags(output, *inputs, **flags)]

        def hear_interrupts() -> None:  # a shell starts what it puts in the background with SIGINT ignored
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts
        )

    def run(self, output: Path, *inputs: object, **flags: object) -> "subprocess.CompletedProcess[str]":
        process = self.start(output, *inputs, **flags)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess([], process.returncode, out, err)


@pytest.fixture
def prepare(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    return Prepare(tokenizer_folder, monkeypatch)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks out of small files (in this process only)."""
    monkeypatch.setattr(data_prep.reading.chunks, "CHUNK_BYTES", 3000)


def read_texts(folder: Path) -> list[str]:
    """The documents of a shard folder, as text."""
    reader, tokenizer = ShardReader(folder), load_tokenizer(folder)
    tokens = reader.read(0, reader.num_tokens)
    starts = reader.document_starts(0, reader.num_tokens)
    assert all(tokens[start - 1] == tokenizer.eos_token_id for start in [*starts[1:], reader.num_tokens])
    return [tokenizer.decode(document[:-1]) for document in np.split(tokens, starts[1:])]


def read_both(output: Path) -> list[str]:
    return read_texts(output / "train") + read_texts(output / "val")


def read_folder(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


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


def interrupt_at(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    add_chunk = CorpusWriter.add_chunk

    def add(self: CorpusWriter, index: int, *args: object) -> int:
        if index == chunk:
            raise KeyboardInterrupt
        return add_chunk(self, index, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(CorpusWriter, "add_chunk", add)


def test_interrupted_at_any_chunk_it_ends_with_the_same_bytes(
    tmp_path: Path, prepare: Prepare, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = make_texts(500)
    source = write_jsonl(tmp_path / "a.jsonl", texts + texts[:100])
    with source.open("a") as file:
        file.write("broken\n")
    prepare(tmp_path / "whole", source, dedup=True)
    num_chunks = -(-source.stat().st_size // 3000)
    for chunk in range(0, num_chunks - 4, 5):
        output = tmp_path / f"out{chunk}"
        for at in (chunk, chunk + 2):  # twice
            with monkeypatch.context() as patch:
                interrupt_at(patch, at)
                with pytest.raises(KeyboardInterrupt):
                    prepare(output, source, dedup=True)
            assert find_unfinished(output)
        prepare(output, source, dedup=True)
        assert read_folder(output) == read_folder(tmp_path / "whole")


def find_unfinished(output: Path) -> bool:
    """Whether nothing in the folder could be taken for a finished corpus."""
    return not output.exists() or {file.name for file in output.iterdir()} <= {".lock", ".partial"}


def test_what_is_finished_is_not_encoded_again(
    tmp_path: Path, prepare: Prepare, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(500))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 20)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "out", source)
    journal = (tmp_path / "out" / ".partial" / "journal.jsonl").read_text().splitlines()
    assert json.loads(journal[-1])["first_chunk"] > 10
    encoded: list[str] = []
    tokenizer_class = type(load_tokenizer(prepare._tokenizer))
    encode_packed = tokenizer_class.encode_packed

    def count(self: object, texts: list[str], *args: object, **flags: object) -> object:
        encoded.extend(texts)
        return encode_packed(self, texts, *args, **flags)  # type: ignore[arg-type]

    monkeypatch.setattr(tokenizer_class, "encode_packed", count)
    prepare(tmp_path / "out", source)
    train = read_texts(tmp_path / "out" / "train")
    assert train[0] not in encoded and train[-1] in encoded
    assert len(encoded) < 0.8 * 500


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_it_continues_and_leaves_no_process(tmp_path: Path, prepare: Prepare, workers: int) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(20_000))
    flags = {"workers": workers, "shard_tokens": 100_000}
    prepare(tmp_path / "whole", source, **flags)
    process = prepare.start(tmp_path / "out", source, **flags)
    while not list(tmp_path.glob("out/.partial/train/shard_00001.npy")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    children = find_children(process.pid)
    assert workers == 1 or len(children) >= workers
    process.kill()
    process.communicate()
    assert find_unfinished(tmp_path / "out")
    result = prepare.run(tmp_path / "out", source, **flags)
    assert result.returncode == 0, result.stderr
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "whole")
    assert not [child for child in children if Path(f"/proc/{child}/cmdline").exists() and not is_zombie(child)]


def find_children(pid: int) -> list[int]:
    children = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has just ended
            children += map(int, path.read_text().split())
    return children


def is_zombie(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    return True


@pytest.mark.parametrize("started", [False, True])
def test_interrupt_by_the_terminal_is_one_word(tmp_path: Path, prepare: Prepare, started: bool) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(30_000))
    process = prepare.start(tmp_path / "out", source, workers=2, shard_tokens=100_000)
    while len(find_children(process.pid)) < 2 + started:  # workers, and multiprocessing's tracker
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    while started and not list(tmp_path.glob("out/.partial/train/shard_00000.npy")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    children = find_children(process.pid)
    for pid in (process.pid, *children):  # as a terminal does
        os.kill(pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err and err.splitlines()[-1].endswith("interrupted")
    assert find_unfinished(tmp_path / "out")


def test_other_flags_or_inputs_do_not_continue_a_preparation(
    tmp_path: Path, prepare: Prepare, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(300))
    other = write_jsonl(tmp_path / "b.jsonl", make_texts(10))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 10)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "out", source)
    before = read_folder(tmp_path / "out")
    for message, inputs, flags in [
        (r"settings \(val_fraction 0.1\)", [source], {"val_fraction": 0.2}),
        (r"settings \(dedup False\)", [source], {"dedup": True}),
        (rf"inputs \({other} is new\)", [other, source], {}),
        (rf"inputs \({other} in place of {source}\)", [other], {}),
    ]:
        with pytest.raises(UserError, match=f"begun with other {message}.*--overwrite"):
            prepare(tmp_path / "out", *inputs, **flags)
    content = source.read_bytes()
    write_jsonl(source, make_texts(300)[::-1])  # the same size, and the same time
    with pytest.raises(UserError, match=f"begun with other contents of {source}"):
        prepare(tmp_path / "out", source)
    source.write_bytes(content)
    assert read_folder(tmp_path / "out") == before
    prepare(tmp_path / "out", source, val_fraction=0.2, overwrite=True)
    prepare(tmp_path / "whole", source, val_fraction=0.2)
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "whole")


def test_finished_corpus_is_neither_done_again_nor_overwritten(
    tmp_path: Path, prepare: Prepare, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(100))
    prepare(tmp_path / "out", source)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    capsys.readouterr()
    prepare(tmp_path / "out", source, workers=2)
    assert "already prepared" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"prepared from other settings \(text_field \['text'\]\).*--overwrite"):
        prepare(tmp_path / "out", source, text_field="body")
    write_jsonl(source, make_texts(100, seed=0)[::-1])  # the same size
    with pytest.raises(UserError, match=f"prepared from other contents of {source}"):
        prepare(tmp_path / "out", source)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    prepare(tmp_path / "out", source, overwrite=True, val_fraction=0)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"train", "corpus.json"}


@pytest.mark.parametrize("lost", ["shard_00001.npy", "shard_00000.docs.npy"])
def test_a_shard_lost_between_two_runs_is_made_again(
    tmp_path: Path,
    prepare: Prepare,
    small_chunks: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lost: str,
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(500))
    prepare(tmp_path / "whole", source)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 20)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "out", source)
    (tmp_path / "out" / ".partial" / "train" / lost).unlink()
    if lost == "shard_00001.npy":
        prepare(tmp_path / "out", source)
        assert "shard_00001.npy, which is gone: 1 of" in capsys.readouterr().err
    else:
        with pytest.raises(UserError, match=r"begun with other contents of .*, which is gone: .* or give --overwrite"):
            prepare(tmp_path / "out", source)
        prepare(tmp_path / "out", source, overwrite=True)
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "whole")


@pytest.mark.parametrize("name", ["train/shard_00000.npy", "val/shard_00000.docs.npy", "train/tokenizer.model"])
def test_a_finished_corpus_that_lost_a_file_is_not_taken_for_whole(tmp_path: Path, prepare: Prepare, name: str) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(60))
    prepare(tmp_path / "out", source)
    before = read_folder(tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing; give --overwrite to prepare the corpus again"):
        prepare(tmp_path / "out", source)
    prepare(tmp_path / "out", source, overwrite=True)
    assert read_folder(tmp_path / "out") == before


def test_the_corpus_may_lie_among_its_inputs(
    tmp_path: Path, prepare: Prepare, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(60))
    with source.open("a") as file:
        file.write("broken\n")
    for output in (tmp_path / "out", tmp_path):
        prepare(output, tmp_path, max_bad_fraction=0.1)
        prepare(output, tmp_path, max_bad_fraction=0.1)
        assert "already prepared" in capsys.readouterr().out


def test_a_crash_while_the_parts_are_moved_is_mended(
    tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = write_jsonl(tmp_path / "old.jsonl", make_texts(50, seed=9))
    source = write_jsonl(tmp_path / "a.jsonl", [*make_texts(150), "nul \0"])
    flags = {"overwrite": True, "max_bad_fraction": 0.1}
    prepare(tmp_path / "whole", source, **flags)
    replace, partial, moves = os.replace, tmp_path / "out" / ".partial", 0
    for crash_at in range(100):
        prepare(tmp_path / "out", old, **flags)
        calls = iter(range(1000))

        def crash(a: object, b: object, calls: Iterator[int] = calls, crash_at: int = crash_at) -> None:
            # Of the many files that are replaced, those that leave or enter `.partial` itself.
            is_move = partial in (Path(str(a)).parent, Path(str(b)).parent) and Path(str(b)).name != "journal.jsonl"
            if is_move and next(calls) == crash_at:
                raise KeyboardInterrupt
            replace(a, b)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", crash)
            try:
                prepare(tmp_path / "out", source, **flags)
            except KeyboardInterrupt:
                moves += 1
            else:
                break
        prepare(tmp_path / "out", source, **flags)
        assert read_folder(tmp_path / "out") == read_folder(tmp_path / "whole")
    assert moves >= 5


def test_crash_between_the_two_manifests_is_mended(
    tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(150))
    prepare(tmp_path / "whole", source)
    close = ShardWriter.close
    for split in ("train", "val"):

        def crash(self: ShardWriter, split: str = split) -> object:
            if self.folder.name == split:
                raise KeyboardInterrupt
            return close(self)

        output = tmp_path / f"out-{split}"
        with monkeypatch.context() as patch:
            patch.setattr(ShardWriter, "close", crash)
            with pytest.raises(KeyboardInterrupt):
                prepare(output, source)
        assert find_unfinished(output)
        prepare(output, source)
        assert read_folder(output) == read_folder(tmp_path / "whole")


def test_every_input_of_a_folder_counts(tmp_path: Path, prepare: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "wiki.jsonl", ["wiki one", "wiki two"])
    write_jsonl(folder / "train.jsonl", ["news one", " ", ""])
    (folder / "b.txt").write_text("a paragraph")
    prepare(tmp_path / "out", folder, val_fraction=0)
    assert read_texts(tmp_path / "out" / "train") == ["a paragraph", "news one", "wiki one", "wiki two"]
    out = capsys.readouterr().out
    assert f"1 documents  {folder}/train.jsonl" in out and f"2 documents  {folder}/wiki.jsonl" in out
    assert "0 bad, 2 empty and 0 repeated documents left out" in out
    corpus = json.loads((tmp_path / "out" / "corpus.json").read_text())
    assert [(Path(entry["name"]).name, entry["documents"]) for entry in corpus["inputs"]] == [
        ("b.txt", 1),
        ("train.jsonl", 1),
        ("wiki.jsonl", 2),
    ]
    prepare(tmp_path / "out", folder, val_fraction=0)
    assert "already prepared" in capsys.readouterr().out
    (folder / "a.jsonl").write_text('{"text": "new"}')
    with pytest.raises(UserError, match=f"other inputs .*{folder}/a.jsonl is new"):
        prepare(tmp_path / "out", folder, val_fraction=0)
    (folder / "a.jsonl").rename(folder / "z.jsonl")
    with pytest.raises(UserError, match=f"other inputs .*{folder}/z.jsonl is new"):
        prepare(tmp_path / "out", folder, val_fraction=0)
    (folder / "z.jsonl").unlink()
    write_jsonl(folder / "wiki.jsonl", ["WIKI one", "wiki two"])  # the same size
    with pytest.raises(UserError, match=f"other contents of {folder}/wiki.jsonl"):
        prepare(tmp_path / "out", folder, val_fraction=0)


def test_a_changed_data_set_folder_is_another_corpus(tmp_path: Path, prepare: Prepare) -> None:
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", make_texts(10))
    prepare(tmp_path / "out", f"hf:{tmp_path}/set")
    write_jsonl(tmp_path / "set" / "train.jsonl", make_texts(10)[::-1])
    with pytest.raises(UserError, match="other contents of"):
        prepare(tmp_path / "out", f"hf:{tmp_path}/set")


def test_a_damaged_input_once_mended_costs_nothing_before_it(
    tmp_path: Path, prepare: Prepare, small_chunks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    good, cut, last = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "c.jsonl"
    write_jsonl(good, make_texts(500))
    write_jsonl(last, make_texts(20, seed=2))
    whole = gzip.compress(write_jsonl(tmp_path / "b", make_texts(6000, seed=1)).read_bytes())
    cut.write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(UserError, match="damaged or cut short"):
        prepare(tmp_path / "out", good, cut, last)
    first = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out/.partial/train").glob("shard_0000[012].npy")}
    assert len(first) == 3
    cut.write_bytes(whole)
    last.write_text(last.read_text() + '{"text": "one more"}\n')  # not begun: may change
    prepare(tmp_path / "out", good, cut, last)
    note = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("note: "))
    assert re.search(rf"other contents of {cut}: [34] of \d\d finished shards are kept", note)
    prepare(tmp_path / "whole", good, cut, last)
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "whole")
    assert first == {name: (tmp_path / "out/train" / name).stat().st_mtime_ns for name in first}


def test_a_damaged_input_can_be_left_out(tmp_path: Path, prepare: Prepare, small_chunks: None) -> None:
    good, cut = write_jsonl(tmp_path / "a.jsonl", make_texts(500)), tmp_path / "b.jsonl.gz"
    cut.write_bytes(b"\x1f\x8b")
    with pytest.raises(UserError, match="or leave it out"):
        prepare(tmp_path / "out", good, cut)
    prepare(tmp_path / "out", good)
    prepare(tmp_path / "whole", good)
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "whole")


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


@pytest.mark.parametrize("at", range(6))
def test_a_crash_after_a_shard_is_finished_keeps_what_is_known(
    tmp_path: Path, prepare: Prepare, small_chunks: None, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """A shard whose inputs were not noted yet is made again: an input may change before the next run."""
    texts = make_texts(200)
    sources = [write_jsonl(tmp_path / f"{i}.jsonl", texts[20 * i : 20 * i + 20]) for i in range(10)]
    save, count = CorpusFolder.add_shard, itertools.count()

    def crash(self: CorpusFolder, *args: object) -> None:
        if next(count) == at:
            raise KeyboardInterrupt
        save(self, *args)  # type: ignore[arg-type]

    flags = {"shard_tokens": 1000}
    with monkeypatch.context() as patch:
        patch.setattr(CorpusFolder, "add_shard", crash)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "out", *sources, **flags)
    changed = at + 1
    write_jsonl(sources[changed], make_texts(20, seed=7))
    try:
        prepare(tmp_path / "out", *sources, **flags)
    except UserError as error:
        assert "begun with other contents" in str(error)
        return
    prepare(tmp_path / "whole", *sources, **flags)
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "whole")


def test_foreign_folders_are_left_alone(tmp_path: Path, prepare: Prepare) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(20))
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="unknown origin"):
            prepare(tmp_path / "out", source, overwrite=overwrite)
    assert read_folder(tmp_path / "out") == {"train/mine.txt": b"mine"}
    shutil.rmtree(tmp_path / "out" / "train")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    prepare(tmp_path / "out", source)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_two_processes_do_not_write_one_folder(tmp_path: Path, prepare: Prepare) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(20))
    message = "being prepared by another process"
    with (
        contextlib.closing(CorpusFolder(tmp_path / "out", {}, [], ReadOptions(), overwrite=False)),
        pytest.raises(UserError, match=message),
    ):
        prepare(tmp_path / "out", source)
    prepare(tmp_path / "out", source)


def test_full_disk_is_one_line_and_the_run_continues(tmp_path: Path, prepare: Prepare) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(3000))
    prepare(tmp_path / "whole", source, shard_tokens=30_000, workers=1)
    # A limit on the size of a file fails as a full disk does, in the same calls.
    flags = prepare.flags(tmp_path / "out", source, shard_tokens=30_000)
    code = (
        "import resource, signal, sys\n"
        "from data_prep.tokenize_corpus import main\nfrom minimind.errors import run_main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))\n"
        "run_main(main)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "cannot write" in errors[0] and "File too large" in errors[0]
    assert not list((tmp_path / "out").glob("train/*"))
    prepare(tmp_path / "out", source, shard_tokens=30_000)
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "whole")


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
