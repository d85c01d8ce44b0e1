"""Killed, interrupted or out of disk at any moment, a preparation ends with the same bytes, and never half a folder."""

import contextlib
import gzip
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prepared_corpus import (
    Prepare,
    find_unfinished,
    interrupt_at,
    make_texts,
    read_folder,
    read_texts,
    write_jsonl,
)

from data_prep.writing.corpus_folder import CorpusFolder
from minimind.data.shard_writer import ShardWriter
from minimind.data.tokenizer import load_tokenizer
from minimind.errors import UserError


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
    assert re.search(rf"other contents of {cut}: [345] of \d\d finished shards are kept", note)
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
