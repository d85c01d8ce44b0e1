"""One job at a time in a run folder, also on network file systems, and without a lock that outlives its owner.

The lock is a file that names its owner and a count that the owner raises every few seconds. An owner on the same host
is dead when its process is; one elsewhere, when the count stands still. No clock is compared. Knows nothing of runs.
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
from minimind.files import replace_file

LOCK_NAME = "run.lock"
BEAT_SECONDS = 5.0
# Longer than a network file system keeps attributes in its cache, and than a host stalls under memory pressure.
PATIENCE_SECONDS = 45.0


class RunLockError(UserError):
    """Another job works in the run folder."""


class RunLock:
    """The lock while it is held."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._owner = {**_this_process(), "token": uuid.uuid4().hex, "beat": 0}
        self._ended = threading.Event()
        self.is_lost = False
        """Another job took the lock away: nothing may be written any more."""

    def acquire(self) -> None:
        """Take the lock, or take it over from a dead owner (which may need `PATIENCE_SECONDS`).

        Raises:
            RunLockError: a living job holds it.
        """
        while not self._create(self._owner):
            before = self._read()
            if before is None:
                continue
            if not self._is_dead(before):
                raise RunLockError(
                    f"{self._path.parent}: another job works in it: process {before.get('pid')} on "
                    f"{before.get('host')}; wait for it, stop it, or give another --run-dir"
                )
            self._take_away(before)
        threading.Thread(target=self._beat, name="run-lock", daemon=True).start()

    def release(self) -> None:
        """Give the lock up; nothing happens where it was lost."""
        self._ended.set()
        content = self._read()
        if content is not None and content.get("token") == self._owner["token"]:
            self._path.unlink(missing_ok=True)

    def _create(self, owner: dict[str, Any]) -> bool:
        """Whether the lock was free and now names `owner`."""
        try:
            with open(self._path, "x", encoding="utf-8") as file:  # O_EXCL: one of several jobs succeeds, on NFS too
                json.dump(owner, file)
        except FileExistsError:
            return False
        return True

    def _read(self, path: Path | None = None) -> dict[str, Any] | None:
        """What the lock says; None where there is none, and nothing while its owner has not finished writing it."""
        try:
            content = json.loads((path or self._path).read_text(encoding="utf-8"))
            return content if isinstance(content, dict) else {}
        except FileNotFoundError:
            return None
        except ValueError:
            return {}

    def _is_dead(self, owner: dict[str, Any]) -> bool:
        here = _this_process()
        if all(owner.get(key) == here[key] for key in ("host", "boot", "namespace")):
            return _started(owner.get("pid")) != owner.get("started")
        deadline = time.monotonic() + PATIENCE_SECONDS
        print(
            f"{self._path}: left by process {owner.get('pid')} on {owner.get('host')}; watching for "
            f"{PATIENCE_SECONDS:.0f} s whether it lives",
            flush=True,
        )
        while time.monotonic() < deadline:
            time.sleep(min(1.0, BEAT_SECONDS))
            if self._read() != owner:
                return False
        return True

    def _take_away(self, owner: dict[str, Any]) -> None:
        """Remove a dead owner's lock. Of several jobs that try, none removes the lock of another that was faster."""
        aside = self._path.with_name(f".{self._path.name}.{self._owner['token']}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._path, aside)
            taken = self._read(aside) or {}
            if taken.get("token") != owner.get("token"):
                self._create(taken)
            aside.unlink()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                content = self._read()
                if content is None or content.get("token") != self._owner["token"]:
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
    lock = RunLock(run_dir / LOCK_NAME)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise UserError(f"run_dir {run_dir}: {error.strerror}; give a folder that can be written") from None
    try:
        yield lock
    finally:
        lock.release()


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": _first_line("/proc/sys/kernel/random/boot_id"),
        "namespace": _link("/proc/self/ns/pid"),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _started(pid: Any) -> str | None:
    """When a process of this host began, in ticks since the boot, or None where there is none of that number.

    Without /proc (not Linux) only whether it is there is known.
    """
    if os.path.isdir("/proc/self"):
        # The name in parentheses may hold blanks; the state is the first field behind it, the start time the twentieth.
        fields = _first_line(f"/proc/{pid}/stat").rpartition(")")[2].split()
        return fields[19] if len(fields) > 19 and fields[0] != "Z" else None
    try:
        os.kill(int(pid), 0)
    except (OSError, TypeError, ValueError):
        return None
    return "running"


def _first_line(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.readline().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
