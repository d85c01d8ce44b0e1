"""Text that lies elsewhere is read as text that lies here, and a corpus is written where others are to read it."""

import gzip
import json
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from prepared_corpus import Prepare, interrupt_at, make_texts, read_both, read_folder, write_jsonl
from remote_server import FolderServer, serve_folder

import minimind.remote as remote
from minimind.data.shards import open_split
from minimind.errors import UserError


@pytest.fixture(autouse=True)
def at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(remote, "_BLOCK_BYTES", 5000)
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def server(tmp_path: Path):
    """A folder with texts in three formats."""
    folder = tmp_path / "served/text"
    folder.mkdir(parents=True)
    texts = make_texts(300)
    write_jsonl(folder / "a.jsonl", texts[:100])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(write_jsonl(tmp_path / "b", texts[100:200]).read_bytes()))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[200:]}), folder / "c.parquet")
    (folder / "unknown.bin").write_bytes(b"x")
    with serve_folder(tmp_path / "served") as found:
        yield found


def test_remote_text_gives_the_same_shards(
    server: FolderServer, tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch, small_chunks: None
) -> None:
    here = server.folder / "text"
    prepare(tmp_path / "here", here)
    expected = {name: data for name, data in read_folder(tmp_path / "here").items() if name != "corpus.json"}
    urls = [f"{server.url}/text/{name}?signature=secret" for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")]
    server.fail = [503, None, "cut", None, 503, "cut"]
    prepare(tmp_path / "far", *urls)
    assert not server.fail
    found = read_folder(tmp_path / "far")
    assert json.loads(found.pop("corpus.json"))["inputs"][0]["name"] == f"{server.url}/text/a.jsonl"
    assert found == expected
    assert b"secret" not in b"".join(read_folder(tmp_path / "far").values())
    # A folder, a pattern; interrupted on the way; the same again.
    filesystem = fsspec.filesystem("memory")
    for file in here.iterdir():
        filesystem.pipe(f"/texts/in/{file.name}", file.read_bytes())
    for word, output in (("memory://texts", "folder"), ("memory://texts/*/[abc].*", "pattern")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_at(patch, 8)
            prepare(tmp_path / output, word)
        prepare(tmp_path / output, word)
        prepare(tmp_path / output, word)
        found = read_folder(tmp_path / output)
        assert {name: found[name] for name in expected} == expected and len(found) == len(expected) + 1
    filesystem.pipe("/texts/in/a.jsonl", (here / "a.jsonl").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"other contents of memory://.*a\.jsonl"):
        prepare(tmp_path / "folder", "memory://texts")
    filesystem.rm("/texts", recursive=True)


def test_what_cannot_be_read_is_one_line_and_leaves_nothing(
    server: FolderServer, tmp_path: Path, prepare: Prepare
) -> None:
    server.fail = [None, None, None, *[503] * 100]
    with pytest.raises(UserError, match=r"cannot read http.*a\.jsonl: the server answers 503 \(3 tries\)$"):
        prepare(tmp_path / "out", f"{server.url}/text/a.jsonl")
    server.fail = []
    for word, message in [
        (f"{server.url}/text/none.jsonl", "no such file"),
        (f"{server.url}/text/unknown.bin", "is no file or folder with files of a known format"),
        ("memory://nothing", "is no file or folder"),
        ("memory://nothing/*.jsonl", "matches no file"),
        ("http://user:secret@host/a.jsonl", "give credentials by the environment"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            prepare(tmp_path / "out", word)
        assert "secret" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_corpus_is_stored_whole_or_not_at_all(
    tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(200))
    prepare(tmp_path / "here", source)
    store, stored = remote.store, []

    def fail(path: Path, url: str) -> None:
        if len(stored) == 4:
            raise remote.RemoteError("the store is gone")
        store(path, url)
        stored.append(path.name)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="the store is gone"):
        patch.setattr(remote, "store", fail)
        prepare(Path("memory://corpora/a"), source)
    with pytest.raises(UserError, match="holds no finished shards"):
        open_split(Path("memory://corpora/a"), "train")
    stored.clear()
    with monkeypatch.context() as patch:
        patch.setattr(remote, "store", lambda path, url: (store(path, url), stored.append(path.name)))
        prepare("memory://corpora/a", source)  # type: ignore[arg-type]
    filesystem = fsspec.filesystem("memory")
    found = {name.removeprefix("/corpora/a/"): filesystem.cat(name) for name in filesystem.find("/corpora/a")}
    assert found == read_folder(tmp_path / "here")
    assert stored[-1] == "corpus.json" and stored[-2] == stored[-3] == "manifest.json"
    assert len(stored) == len(found) - 4, "what had arrived was copied again"
    assert not list((tmp_path / "cache/outputs").iterdir())
    far = open_split(Path("memory://corpora/a"), "train")
    assert far.fingerprint == open_split(tmp_path / "here", "train").fingerprint
    with pytest.raises(UserError, match="holds a corpus"):
        prepare("memory://corpora/a", source)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="is not on this machine"):
        prepare("memory://corpora/a", source, append=True)  # type: ignore[arg-type]
    prepare("memory://corpora/a", source, overwrite=True, dedup=True)  # type: ignore[arg-type]
    assert sorted(read_both(tmp_path / "here"))
    filesystem.rm("/corpora", recursive=True)
