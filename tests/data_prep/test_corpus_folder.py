"""Which folder a preparation takes for its own, for finished, or for another's."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from prepared_corpus import (
    Prepare,
    interrupt_at,
    make_texts,
    read_folder,
    read_texts,
    write_jsonl,
)

from data_prep.reading.records import ReadOptions
from data_prep.writing.corpus_folder import CorpusFolder
from minimind.errors import UserError


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
