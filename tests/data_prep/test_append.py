"""A finished corpus takes new files as new shards, and nothing of what was there moves."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prepared_corpus import Prepare, interrupt_at, make_texts, read_both, read_folder, read_texts, write_jsonl

from data_prep.train_tokenizer import cut_sentences, save_tokenizer, train_tokenizer
from data_prep.verify_shards import verify_corpus
from minimind.data.manifest import Manifest
from minimind.data.shards import ShardReader, find_parts, open_split
from minimind.errors import UserError

SHARD = {"shard_tokens": 3000}


def test_new_files_are_new_shards_and_the_old_ones_stay(
    tmp_path: Path, prepare: Prepare, capsys: pytest.CaptureFixture[str]
) -> None:
    old = write_jsonl(tmp_path / "a.jsonl", make_texts(300))
    new = write_jsonl(tmp_path / "b.jsonl", make_texts(200, seed=1))
    with new.open("a") as file:
        file.write("broken\n")
    prepare(tmp_path / "out", old, **SHARD)
    before, first = read_folder(tmp_path / "out"), open_split(tmp_path / "out", "train")
    prepare(tmp_path / "out", tmp_path / "*.jsonl", append=True, **SHARD)
    assert "1 of 2 inputs are in the corpus already" in capsys.readouterr().out
    prepare(tmp_path / "alone", new, **SHARD)
    after = read_folder(tmp_path / "out")
    changed = {name for name, content in before.items() if after[name] != content}
    assert changed == {"corpus.json", "train/manifest.json", "val/manifest.json"}
    for split in ("train", "val"):
        expected = read_texts(tmp_path / "alone" / split)
        assert read_texts(tmp_path / "out" / split)[-len(expected) :] == expected
        parts = Manifest.load(tmp_path / "out" / split).parts
        assert parts is not None and len(parts) == 2 and min(parts) > 0
    verify_corpus(tmp_path / "out")
    # The corpus as it was.
    grown = open_split(tmp_path / "out", "train")
    assert grown.fingerprint != first.fingerprint
    assert find_parts(grown.manifest, [first.fingerprint]) == 1 and find_parts(grown.manifest, ["another"]) is None
    cut = ShardReader(tmp_path / "out" / "train", parts=1)
    assert cut.manifest == first.manifest and cut.fingerprint == first.fingerprint
    with pytest.raises(UserError, match="corpus_parts 3: the corpus has 2"):
        open_split(tmp_path / "out", "train", parts=3)
    # Both commands again: nothing to do. A third part follows.
    prepare(tmp_path / "out", old, **SHARD)
    prepare(tmp_path / "out", new, append=True, **SHARD)
    assert read_folder(tmp_path / "out") == after
    third = write_jsonl(tmp_path / "c.jsonl", make_texts(30, seed=2))
    prepare(tmp_path / "out", third, append=True, val_fraction=0, **SHARD)
    assert Manifest.load(tmp_path / "out" / "val").parts == (*parts, 0)
    corpus = json.loads((tmp_path / "out/corpus.json").read_text())
    assert [len(part["inputs"]) for part in corpus["appended"]] == [1, 1]
    assert (tmp_path / "out/bad_documents.txt").read_text().count("b.jsonl") == 1


def test_what_does_not_fit_the_corpus_is_refused(tmp_path: Path, prepare: Prepare) -> None:
    old = write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    new = write_jsonl(tmp_path / "b.jsonl", make_texts(50, seed=1))
    with pytest.raises(UserError, match="holds no finished corpus"):
        prepare(tmp_path / "out", new, append=True)
    assert not (tmp_path / "out").exists()
    prepare(tmp_path / "out", old, val_fraction=0)
    before = read_folder(tmp_path / "out")
    save_tokenizer(train_tokenizer(list(cut_sentences(make_texts(100, seed=3))), 300), tmp_path / "other")
    for message, inputs, flags in [
        ("the tokenizer of .* is [0-9a-f]{64}, here it is", [new], {"tokenizer": tmp_path / "other"}),
        ("digests_00000.bin is missing", [new], {"dedup": True}),
        ("exclude each other", [new], {"overwrite": True}),
    ]:
        with pytest.raises(UserError, match=message):
            prepare(tmp_path / "out", *inputs, append=True, **flags)
    write_jsonl(old, make_texts(51))
    with pytest.raises(UserError, match=r"a\.jsonl has other contents than when it came into"):
        prepare(tmp_path / "out", old, append=True)
    with pytest.raises(UserError, match=r"b\.jsonl is new.*--append to add"):
        write_jsonl(old, make_texts(50))
        prepare(tmp_path / "out", old, new, val_fraction=0)
    assert read_folder(tmp_path / "out") == before
    # A split that the corpus did not have begins with the part that brings it.
    prepare(tmp_path / "out", new, append=True, val_fraction=0.2)
    assert (Manifest.load(tmp_path / "out/val").parts or ())[0] == 0
    assert open_split(tmp_path / "out", "val", parts=1).num_tokens == 0


def test_documents_of_earlier_parts_are_repeats(tmp_path: Path, prepare: Prepare, small_chunks: None) -> None:
    texts = make_texts(150) + make_texts(150, seed=1)
    files = [write_jsonl(tmp_path / f"{i}.jsonl", texts[50 * i : 50 * i + 120]) for i in range(4)]
    for file in files:
        prepare(tmp_path / "out", file, dedup=True, append=file != files[0])
    assert sorted(read_both(tmp_path / "out")) == sorted({*texts[:270]})
    # Documents beyond a limit are not in the corpus, and come with a later part.
    prepare(tmp_path / "limited", files[0], dedup=True, max_documents=20)
    shutil.copy(files[0], tmp_path / "copy.jsonl")
    with (tmp_path / "copy.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    prepare(tmp_path / "limited", tmp_path / "copy.jsonl", dedup=True, append=True)
    assert sorted(read_both(tmp_path / "limited")) == sorted({*texts[:120], "one more"})


def test_an_interrupted_part_continues_and_hurts_nobody(
    tmp_path: Path, prepare: Prepare, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any chunk, and between any two moves of the publication."""
    old = write_jsonl(tmp_path / "a.jsonl", make_texts(60))
    new = write_jsonl(tmp_path / "b.jsonl", make_texts(200, seed=1))
    flags = {"dedup": True, "shard_tokens": 1500}
    prepare(tmp_path / "base", old, **flags)
    before = read_folder(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "whole")
    prepare(tmp_path / "whole", new, append=True, **flags)
    whole = read_folder(tmp_path / "whole")
    shutil.copytree(tmp_path / "base", tmp_path / "out")
    for chunk in (2, 6):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_at(patch, chunk)
            prepare(tmp_path / "out", new, append=True, **flags)
        assert read_folder(tmp_path / "out").items() >= before.items()
        prepare(tmp_path / "out", old, **flags)  # the corpus itself: nothing to do, nothing lost
        assert open_split(tmp_path / "out", "train").fingerprint == open_split(tmp_path / "base", "train").fingerprint
    assert list((tmp_path / "out/.partial/train").glob("shard_*.npy"))
    replace, moves = os.replace, 0
    while moves < 100:
        left = moves

        def crash(a: object, b: object) -> None:
            nonlocal left
            inside = Path(str(b)).parent
            if ".partial" in Path(str(a)).parts and ".partial" not in inside.parts:
                if not left:
                    raise KeyboardInterrupt
                left -= 1
            replace(a, b)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", crash)
            try:
                prepare(tmp_path / "out", new, append=True, **flags)
            except KeyboardInterrupt:
                moves += 1
                for split in ("train", "val"):  # each manifest has all its shards
                    ShardReader(tmp_path / "out" / split)
            else:
                break
        # The first command finishes it too.
        prepare(tmp_path / "out", *([old] if moves % 2 else [new]), append=not moves % 2, **flags)
        assert read_folder(tmp_path / "out") == whole
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "base", tmp_path / "out")
    assert moves > 8


def test_killed_or_out_of_disk_the_corpus_is_as_it_was(tmp_path: Path, prepare: Prepare) -> None:
    old = write_jsonl(tmp_path / "a.jsonl", make_texts(60))
    new = write_jsonl(tmp_path / "b.jsonl", make_texts(8000, seed=1))
    flags = {"shard_tokens": 50_000}
    prepare(tmp_path / "out", old, **flags)
    before = read_folder(tmp_path / "out")
    process = prepare.start(tmp_path / "out", new, append=True, **flags)
    while not list(tmp_path.glob("out/.partial/train/shard_00002.npy")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert read_folder(tmp_path / "out").items() >= before.items()
    command = [sys.executable, "-m", "data_prep.tokenize_corpus"]
    command += prepare.flags(tmp_path / "out", new, append=True, **flags)

    def limit_files() -> None:  # fails as a full disk does, in the same calls
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))

    result = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit_files)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(errors) == 1 and "File too large" in errors[0]
    assert read_folder(tmp_path / "out").items() >= before.items()
    prepare(tmp_path / "out", new, append=True, **flags)
    prepare(tmp_path / "whole", old, **flags)
    prepare(tmp_path / "whole", new, append=True, **flags)
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "whole")
