"""One job in a run folder: the second is refused, a dead owner is followed, wherever it ran."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from minimind.host import boot_id
from minimind.training import run_lock
from minimind.training.run_lock import LOCK_NAME, RunLock, RunLockError, hold_run_folder


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(run_lock, "PATIENCE_SECONDS", 0.6)


def write_owner(folder, **changes):
    owner = {"host": "here", "boot": boot_id(), "pid": 1, "token": "other", "beat": 0, **changes}
    (folder / LOCK_NAME).write_text(json.dumps(owner))
    return owner


def test_the_second_job_is_refused_and_the_folder_is_free_afterwards(tmp_path):
    with hold_run_folder(tmp_path), pytest.raises(RunLockError, match=f"process {os.getpid()} on"):
        RunLock(tmp_path).acquire()
    with hold_run_folder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_killed_owner_of_this_host_is_followed_at_once(tmp_path):
    code = f"""
import sys, time
sys.path.insert(0, {os.getcwd()!r})
from pathlib import Path
from minimind.training.run_lock import RunLock
lock = RunLock(Path({str(tmp_path)!r}))
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == b"held\n"
        with pytest.raises(RunLockError, match=f"process {owner.pid} on"):
            RunLock(tmp_path).acquire()
        owner.kill()
        owner.wait()
    began = time.monotonic()
    with hold_run_folder(tmp_path) as lock:
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid() and not lock.is_lost
    assert time.monotonic() - began < 5


def test_another_process_with_the_number_of_a_dead_owner_does_not_hold_the_lock(tmp_path):
    write_owner(tmp_path, pid=os.getpid())
    with hold_run_folder(tmp_path):
        pass


def test_without_locks_of_the_file_system_the_count_decides(tmp_path, quick, monkeypatch, capsys):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    write_owner(tmp_path)
    with hold_run_folder(tmp_path), pytest.raises(RunLockError, match=f"process {os.getpid()} on"):
        RunLock(tmp_path).acquire()
    assert "left by process 1 on here; watching" in capsys.readouterr().out


def test_an_owner_elsewhere_is_dead_when_its_count_stops(tmp_path, quick):
    write_owner(tmp_path, boot="another")
    with hold_run_folder(tmp_path) as lock:
        assert not lock.is_lost


def test_an_owner_elsewhere_that_counts_keeps_the_lock(tmp_path, quick):
    owner = write_owner(tmp_path, host="elsewhere", boot="another")
    ended = threading.Event()

    def beat():
        while not ended.wait(0.05):
            owner["beat"] += 1
            run_lock.replace_file(tmp_path / LOCK_NAME, json.dumps(owner))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(RunLockError, match="elsewhere"):
            RunLock(tmp_path).acquire()
    finally:
        ended.set()
        thread.join()


def test_an_owner_notices_that_it_was_taken_over_and_leaves_the_new_lock_alone(tmp_path, quick):
    lock = RunLock(tmp_path)
    lock.acquire()
    write_owner(tmp_path, token="new")
    deadline = time.monotonic() + 10
    while not lock.is_lost and time.monotonic() < deadline:
        time.sleep(0.02)
    assert lock.is_lost
    lock.release()
    assert json.loads((tmp_path / LOCK_NAME).read_text())["token"] == "new"


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_lock_cut_short_by_a_crash_is_followed(tmp_path, quick, content):
    (tmp_path / LOCK_NAME).write_text(content)
    with hold_run_folder(tmp_path):
        pass
