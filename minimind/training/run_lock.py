"""One job at a time in a run folder, on this host and on others.

On one host the operating system's lock keeps jobs apart, and ends with its process. It may not reach other hosts, so
the owner also writes a file with a count that it raises every few seconds: an owner on another host is dead when its
count stops. No clocks are compared.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minimind.errors import UserError
from minimind.files import FolderLock, replace_file
from minimind.host import boot_id

LOCK_NAME = "run.lock"
BEAT_SECONDS = 5.0
PATIENCE_SECONDS = 45.0
"""Longer than a network file system caches attributes, and than a host stalls under memory pressure."""


class RunLockError(UserError):
    """Another job works in the run folder."""


class RunLock:
    """Holds a run folder from `acquire` to `release`."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / LOCK_NAME
        self._owner: dict[str, Any] = {"host": socket.gethostname(), "boot": boot_id(), "pid": os.getpid()}
        self._owner |= {"token": uuid.uuid4().hex, "beat": 0}
        self._released = threading.Event()
        self.is_lost = False
        """Another job took the lock away: nothing may be written any more."""

    def acquire(self) -> None:
        """Take the lock, or take it over from a dead owner (which may need `PATIENCE_SECONDS`).

        Raises:
            RunLockError: a living job holds it.
        """
        try:
            self._local = FolderLock(self._path.parent)
        except BlockingIOError:
            raise self._refusal(self._read() or {}) from None
        try:
            while not self._create():
                owner = self._read()
                if owner is not None:
                    self._check_dead(owner)
                    self._path.unlink(missing_ok=True)
        except BaseException:
            self._local.release()
            raise
        threading.Thread(target=self._beat, name="run-lock", daemon=True).start()

    def release(self) -> None:
        """Give the lock up; one that was lost is left to its new owner."""
        self._released.set()
        if self._is_ours():
            self._path.unlink(missing_ok=True)
        self._local.release()

    def _create(self) -> bool:
        """Whether there was no owner, and this job now is."""
        try:
            with open(self._path, "x", encoding="utf-8") as file:  # O_EXCL: one of several jobs succeeds, on NFS too
                json.dump(self._owner, file)
        except FileExistsError:
            return False
        return True

    def _read(self) -> dict[str, Any] | None:
        """The owner: None if there is none, {} while it is being written or where it is damaged."""
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

    def _is_ours(self) -> bool:
        return (self._read() or {}).get("token") == self._owner["token"]

    def _check_dead(self, owner: dict[str, Any]) -> None:
        """Raise `RunLockError` if the owner of a lock that this host's operating system gave us lives elsewhere."""
        if self._local.excludes and owner.get("boot") == self._owner["boot"] != "":
            return
        who = f"process {owner.get('pid')} on {owner.get('host')}"
        print(f"{self._path}: left by {who}; watching for {PATIENCE_SECONDS:.0f} s whether it is alive", flush=True)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(1.0, BEAT_SECONDS))
            if self._read() != owner:
                raise self._refusal(self._read() or owner)

    def _refusal(self, owner: dict[str, Any]) -> RunLockError:
        who = f"process {owner.get('pid')} on {owner.get('host')}" if owner else "it has just started"
        return RunLockError(
            f"{self._path.parent}: another job works in it: {who}; wait for it, stop it, or give another --run-dir"
        )

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            try:
                if not self._is_ours():
                    self.is_lost = True
                    return
                self._owner["beat"] += 1
                replace_file(self._path, json.dumps(self._owner))
            except OSError:
                continue  # a disk that is full or away for a moment; the next beat tries again


@contextlib.contextmanager
def hold_run_folder(run_dir: Path) -> Iterator[RunLock]:
    """Be the only job that works in `run_dir`, which is made if need be. One rank calls this.

    Raises:
        RunLockError: a living job works in it.
        UserError: it cannot be written.
    """
    lock = RunLock(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise UserError(f"run_dir {run_dir}: {error.strerror}; give a folder that can be written") from None
    try:
        yield lock
    finally:
        lock.release()
