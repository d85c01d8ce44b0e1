"""Remote files: what may pass is tried again, what does not is one line, and nothing half-written is left."""

import hashlib
import io
from pathlib import Path

import fsspec
import pytest
from remote_server import FolderServer, serve_folder

import minimind.remote as remote
from minimind.remote import RemoteError, RemoteFile, fetch, list_files, redact, store_folder, url_of


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(remote, "_BLOCK_BYTES", 1000)


@pytest.fixture
def server(tmp_path: Path):
    (tmp_path / "served").mkdir()
    with serve_folder(tmp_path / "served") as found:
        yield found


def test_urls_are_told_from_paths():
    for word, url in [
        ("s3://bucket/a", "s3://bucket/a"),
        (Path("s3://bucket/a"), "s3://bucket/a"),
        (Path("hf://datasets/x/y/"), "hf://datasets/x/y"),
        (Path("memory:///a"), "memory://a"),
        ("data/a", None), ("/data/a", None), ("hf:NAME", None), ("C:/data", None), ("file:///a", None),
    ]:  # fmt: skip
        assert url_of(word) == url
    with pytest.raises(RemoteError, match=r"http://\.\.\.@\.\.\.: give credentials by the environment") as error:
        url_of("http://user:secret@host/a")
    assert "secret" not in str(error.value)
    assert redact("cannot read https://u:pw@host/a?X-Signature=abc: no") == "cannot read https://host/a?...: no"


def test_what_may_pass_is_tried_again(server: FolderServer, tmp_path: Path):
    data = bytes(range(256)) * 20
    (server.folder / "a.bin").write_bytes(data)
    for failures in ([503, 503], ["cut", "cut"], [503, "cut"]):
        server.fail = list(failures)
        fetch(f"{server.url}/a.bin", tmp_path / "copy", hashlib.sha256(data).hexdigest())
        assert (tmp_path / "copy").read_bytes() == data and not server.fail
        (tmp_path / "copy").unlink()
    # Seeks as Parquet does: the end first, then parts.
    stream = io.BufferedReader(RemoteFile(f"{server.url}/a.bin"))
    server.fail = ["cut"]
    stream.seek(-10, io.SEEK_END)
    assert stream.read() == data[-10:] and stream.seek(100) == 100 and stream.read(3000) == data[100:3100]


@pytest.mark.parametrize(
    ("failures", "message"),
    [
        ([503] * 20, r"cannot read http://127\.0\.0\.1:\d+/a\.bin\?\.\.\.: the server answers 503 \(3 tries\)$"),
        (["cut"] * 20, r"a\.bin\?\.\.\.: .*\(3 tries\)$"),
        (None, r"no such file or folder$"),
        ("down", r"\(3 tries\)$"),
        ("damaged", r"is damaged: its sha256 is"),
    ],
)
def test_what_does_not_is_one_line_and_leaves_nothing(server: FolderServer, tmp_path: Path, failures, message: str):
    if failures is not None:
        (server.folder / "a.bin").write_bytes(bytes(5000))
    if failures == "down":
        server.close()
    elif isinstance(failures, list):
        server.fail = [None, *failures] if failures[0] == "cut" else list(failures)
    (tmp_path / "to").mkdir()
    with pytest.raises(RemoteError, match=message) as error:
        fetch(f"{server.url}/a.bin?token=secret", tmp_path / "to/copy", "0" * 64)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "to").iterdir())


def test_a_file_that_changes_is_not_taken(server: FolderServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (server.folder / "a.bin").write_bytes(bytes(3000))
    read_range = remote.read_range

    def change(url: str, *args: int) -> bytes:
        data = read_range(url, *args)
        (server.folder / "a.bin").write_bytes(bytes([1]) * 3000)
        return data

    monkeypatch.setattr(remote, "read_range", change)
    with pytest.raises(RemoteError, match="changed while it was read"):
        fetch(f"{server.url}/a.bin", tmp_path / "copy")


def test_a_folder_is_stored_with_its_mark_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a/b").mkdir(parents=True)
    for name in ("a/z", "a/b/c", "a/mark"):
        (tmp_path / name).write_bytes(name.encode())
    stored: list[str] = []
    store = remote.store
    monkeypatch.setattr(remote, "store", lambda path, url: (stored.append(path.name), store(path, url)))
    flags = (tmp_path / "a", "memory://stored/a", ("mark",), tmp_path / "journal")
    store_folder(*flags)
    assert stored == ["c", "z", "mark"]
    assert list_files("memory://stored/a", recursive=True) == {"b/c": 5, "z": 3, "mark": 6}
    (tmp_path / "a/z").write_bytes(b"new")
    store_folder(*flags)
    assert stored[3:] == ["z", "mark"]
    assert list_files("memory://nothing/here") == {}
    fsspec.filesystem("memory").rm("/stored", recursive=True)


def test_a_store_whose_package_is_missing_says_which():
    with pytest.raises(RemoteError, match="install the package"):
        remote.describe("adl://container/a")
