"""Files that are either whole or not there."""

import fcntl
import hashlib
import os

import pytest

from minimind.files import FolderLock, fsync_folder, hash_file, new_folder, replace_file


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "file"
    replace_file(path, "old")
    replace_file(path, "नया 🙂")
    assert path.read_text(encoding="utf-8") == "नया 🙂"
    replace_file(path, b"\0\xff")
    assert path.read_bytes() == b"\0\xff"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    replace_file(path, "old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_errors_of_the_system_go_through(tmp_path):
    with pytest.raises(FileNotFoundError):
        replace_file(tmp_path / "nowhere" / "file", b"")
    with pytest.raises(FileNotFoundError):
        fsync_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        hash_file(tmp_path / "nowhere")


def test_a_file_of_many_chunks_has_the_hash_of_its_content(tmp_path):
    content = os.urandom((1 << 21) + 17)
    replace_file(tmp_path / "file", content)
    assert hash_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    final = tmp_path / "runs" / "folder"
    with pytest.raises(RuntimeError), new_folder(final) as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert os.listdir(final.parent) == []
    for name in ("old", "new"):
        with new_folder(final) as folder:
            (folder / name).touch()
            assert not (final / name).exists()
        assert os.listdir(final.parent) == ["folder"] and os.listdir(final) == [name]


def test_a_folder_lock_keeps_others_out_and_leaves_no_file(tmp_path):
    lock = FolderLock(tmp_path)
    with pytest.raises(BlockingIOError):
        FolderLock(tmp_path)
    lock.release()
    lock.release()
    assert os.listdir(tmp_path) == []
    FolderLock(tmp_path).release()


def test_a_lock_whose_file_its_owner_removes_meanwhile_is_taken_on_a_new_file(tmp_path, monkeypatch):
    """Two processes that hold locks on two files of one name would both work in the folder."""
    first, flock = FolderLock(tmp_path), fcntl.flock

    def release_first(descriptor: int, how: int) -> None:
        first.release()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", release_first)
    second = FolderLock(tmp_path)
    monkeypatch.undo()
    with pytest.raises(BlockingIOError):
        FolderLock(tmp_path)
    second.release()
