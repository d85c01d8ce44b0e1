"""What a command line names: files, folders, links, pipes, data sets of Hugging Face."""

import errno
import io
import json
import os
import threading
import types
from pathlib import Path

import pytest
from corpus_inputs import TEXTS, read, write

from data_prep.reading.records import ReadOptions
from data_prep.reading.sources import resolve_sources
from data_prep.reading.tables import find_commit
from data_prep.writing.corpus_folder import CorpusFolder
from minimind.errors import UserError


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_data_set_folder_is_loaded_by_datasets(
    tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / f"train{suffix}", TEXTS)
    write(folder / f"test{suffix}", ["held out"])
    assert read(f"hf:{folder}") == TEXTS
    assert f"note: hf:{folder}: splits not read: test" in capsys.readouterr().err
    assert read(f"hf:{folder}", hf_split="test") == ["held out"]
    assert read(f"hf:{folder}", hf_split="train[:10%]", hf_streaming=False) == TEXTS[:4]
    for message, options in [
        ("has no column 'body' but id, text", {"text_field": "body"}),
        ("datasets cannot load it", {"hf_split": "nothing"}),
        ("a slice cannot be streamed: give --no-hf-streaming", {"hf_split": "train[:10%]"}),
    ]:
        with pytest.raises(UserError, match=message):
            read(f"hf:{folder}", **options)


def test_saved_data_sets_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import datasets

    one = datasets.Dataset.from_dict({"text": TEXTS})
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select(range(3))}).save_to_disk(tmp_path / "two")
    capsys.readouterr()
    assert read(f"hf:{tmp_path}/one") == read(f"hf:{tmp_path}/two") == TEXTS
    assert "splits not read: test" in capsys.readouterr().err
    for name in ("one", "two"):
        with pytest.raises(UserError, match=f"saved by Hugging Face datasets: give it as hf:{tmp_path}/{name}"):
            read(tmp_path / name)
    with pytest.raises(UserError, match=f"saved by Hugging Face datasets: give it as hf:{tmp_path}/one"):
        read(tmp_path)


class Hub:
    """A data set on the hub to which somebody pushes after each look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets

        self.looks, self.read = 0, []
        for name in ("load_dataset_builder", "load_dataset", "get_dataset_split_names"):
            monkeypatch.setattr(datasets, name, getattr(self, name))

    def load_dataset_builder(self, name: str, config: str | None, revision: str | None) -> object:
        self.looks += 1
        return types.SimpleNamespace(hash=f"commit-{revision or self.looks}")

    def load_dataset(self, name: str, config: str | None, split: str, streaming: bool, revision: str) -> object:
        import datasets

        self.read.append(revision)
        return datasets.Dataset.from_dict({"text": [f"of {revision}"]})

    def get_dataset_split_names(self, name: str, config: str | None, revision: str) -> list[str]:
        assert revision == self.read[-1]
        return ["train"]


def test_one_commit_of_a_data_set_is_read_and_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, source = Hub(monkeypatch), resolve_sources(["hf:someone/something"])[0]
    options = ReadOptions()
    find_commit.cache_clear()
    folder = CorpusFolder(tmp_path / "out", {}, [source], options, overwrite=False)
    assert read("hf:someone/something") == ["of commit-1"]
    folder.publish({"bad_documents": 0, "limit_reached": False, "splits": {}}, {})
    folder.close()
    assert json.loads((tmp_path / "out" / "corpus.json").read_text())["inputs"][0]["sha256"] == "commit-1"
    assert read("hf:someone/something", hf_revision="v2") == ["of commit-v2"] and hub.read == ["commit-1", "commit-v2"]
    find_commit.cache_clear()


def test_a_folder_is_every_file_of_a_known_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a folder, 文件夹"
    for name, data in {
        "wiki.jsonl": '{"text": "wiki one", "meta": 1}\n{"text": "wiki two", "meta": "x"}',
        "train.jsonl": '{"text": "train"}',
        "math-test.jsonl": '{"text": "math"}',
        "novel.txt": "line one\nline two\n\nline three\n",
        "sub/deep er/d.JSONL": '{"text": "deep"}',
        "sub/same.csv": "text\nin sub\n",
        "same.csv": "text\nsame\n",
        "empty.jsonl": "",
        "README.md": "not read",
        "sub/.hidden.jsonl": "not read",
        ".git/x.jsonl": "not read",
    }.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(data)
    (folder / "sub" / "around").symlink_to(folder)
    (folder / "x.jsonl").mkdir()
    (folder / "x.jsonl" / "y.txt").write_text("inside")
    expected = [
        "math",
        "same",
        "line one\nline two",
        "line three",
        "deep",
        "in sub",
        "train",
        "wiki one",
        "wiki two",
        "inside",
    ]
    assert sorted(read(folder)) == sorted(expected)
    assert read(folder) == read(f"{tmp_path}/*") == read(f"{folder}/")
    os.mkfifo(folder / "pipe.jsonl")  # would be waited for
    assert len(read(folder)) == len(expected)
    assert "pipe.jsonl" in capsys.readouterr().err.splitlines()[-1]
    (folder / "pipe.jsonl").unlink()
    read(folder)
    note = capsys.readouterr().err.splitlines()[0]
    assert note == f"note: {folder}: not read (no visible files of a known format): .git, README.md, sub/.hidden.jsonl"
    with pytest.raises(UserError, match="holds no file of a known format"):
        read(make_folder(tmp_path / "empty"))


def test_what_was_prepared_in_a_folder_is_no_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    for name in ("a.txt", "train/b.txt", "corpus.json", "out/train/manifest.json", "out/bad_documents.txt"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text('{"text": "inside"}')
    assert len(read(folder / "train")) == 1  # asked for by its own name
    (folder / "corpus.json").unlink()
    assert len(read(folder)) == 4
    (folder / "out" / "corpus.json").write_text("{}")
    assert len(read(folder)) == 2
    assert "out/bad_documents.txt, out/corpus.json, out/train" in capsys.readouterr().err


def test_a_folder_that_cannot_be_listed_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.jsonl", ["a"])
    closed, scandir = make_folder(tmp_path / "closed"), os.scandir

    def refuse(path: str) -> object:
        if path == str(closed):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=f"cannot read {closed}: Permission denied; make it readable or leave it out"):
        read(tmp_path)


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_links_lead_to_files_once(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ["a"])
    folder = make_folder(tmp_path / "folder")
    (folder / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    assert read(folder) == ["a"]
    (folder / "again.jsonl").symlink_to(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="twice"):
        read(folder)
    (folder / "again.jsonl").unlink()
    (folder / "broken.jsonl").symlink_to(tmp_path / "absent")
    with pytest.raises(UserError, match=r"cannot read .*broken\.jsonl: No such file"):
        read(folder)


def test_standard_input_and_pipes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert read("-", format="jsonl") == TEXTS
    with pytest.raises(UserError, match="say its --format"):
        read("-")
    (tmp_path / "words").write_text("one\n\ntwo")
    assert read(tmp_path / "words", format="txt") == ["one", "two"]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(data,))
    writer.start()
    assert read(pipe, format="jsonl") == TEXTS
    writer.join()


def test_inputs_are_resolved_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "sub/c.JSONL", "sub/d.txt.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [Path(s.name).name for s in resolve_sources([f"{tmp_path}/*.jsonl"])] == ["a.jsonl", "b.jsonl"]
    assert [s.format for s in resolve_sources([f"{tmp_path}/sub/*"])] == ["jsonl", "txt"]
    everything = resolve_sources([f"{tmp_path}/**/*.*", "hf:name/of-it", "owner/name"])
    assert [s.format for s in everything] == ["jsonl", "jsonl", "jsonl", "txt", "dataset", "dataset"]
    assert everything[4].name == "name/of-it" and everything[3].compression == ".gz"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "names no file"),
        (["{tmp}/*.parquet"], "matches no file"),
        (["{tmp}/absent.jsonl"], "does not exist"),
        (["absent.jsonl"], "does not exist"),
        (["./a/b/c"], "does not exist"),
        (["{tmp}/a.md"], "no known format"),
        (["{tmp}/a.jsonl", "{tmp}/*.jsonl"], "twice"),
        (["hf:"], "names no data set"),
    ],
)
def test_wrong_inputs_are_user_errors(tmp_path: Path, words: list[str], message: str) -> None:
    for name in ("a.jsonl", "a.md"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=message):
        resolve_sources([word.format(tmp=tmp_path) for word in words])
