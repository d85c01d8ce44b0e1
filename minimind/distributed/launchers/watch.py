"""Notice the end of the launcher: a process that started this rank, or the reader of its output, is gone.

DeepSpeed's launcher is up to four processes between the user's command and a rank; ending one of them leaves the others
and the ranks running. PR_SET_PDEATHSIG would cover only the parent.
"""

import errno
import io
import os
import select
import stat
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import psutil

POLL_SECONDS = 0.5


def find_launcher(ancestors: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The processes that started this rank and must outlive it, nearest first.

    The parent, and above it every process of DeepSpeed: its launcher on this host, the shell that ssh runs it in with
    the sshd session above it, or the `deepspeed` command itself.
    """
    found = list(ancestors[:1])
    for process in ancestors:
        try:
            words = process.cmdline()
        except psutil.Error:
            break
        is_session = bool(words) and words[0].startswith("sshd") and len(found) > 1
        if not is_session and not any("deepspeed" in word for word in words):
            break
        if process not in found:
            found.append(process)
        if is_session:
            break
    return found


class LauncherWatch:
    """Remembers at construction who started this process; watches them from `start` on, when stopping is possible."""

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._launcher = find_launcher(psutil.Process().parents())
        self._ended = threading.Event()
        self._unread = threading.Event()
        self._streams: tuple[TextIO, TextIO] | None = None

    def start(self, on_end: Callable[[], None]) -> None:
        """Call `on_end` once, from a thread, when a process of the launcher or the reader of the output has ended.

        Output without a reader is discarded; writing it is not an error.
        """
        self._streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (outlive_reader(stream, self._unread.set) for stream in self._streams)
        threading.Thread(target=self._watch, args=(on_end,), name="launcher-watch", daemon=True).start()

    def close(self) -> None:
        """Stop watching; output without a reader is an error again, unless that has happened."""
        self._ended.set()
        if self._streams is not None:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            (sys.stdout, sys.stderr), self._streams = self._streams, None

    def _watch(self, on_end: Callable[[], None]) -> None:
        pipes = select.poll()
        for descriptor in (1, 2):
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
                pipes.register(descriptor, select.POLLERR)
        is_told = False
        while not self._ended.is_set():
            broken = [descriptor for descriptor, _ in pipes.poll(POLL_SECONDS * 1000)]
            for descriptor in broken:
                pipes.unregister(descriptor)
                discard(descriptor)
            is_gone = os.getppid() != self._parent or any(_has_ended(process) for process in self._launcher)
            if not is_told and (broken or is_gone or self._unread.is_set()):
                is_told = True
                on_end()
                print("the launcher has ended: this rank finishes the step, then saves", file=sys.stderr, flush=True)


class _Outliving(io.FileIO):
    """A file that discards what is written after its reader is gone."""

    def __init__(self, descriptor: int, on_loss: Callable[[], None]) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._on_loss = on_loss

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.EIO):
                raise
            discard(self.fileno())
            self._on_loss()
            return memoryview(data).nbytes


def outlive_reader(stream: TextIO, on_loss: Callable[[], None]) -> TextIO:
    """`stream`, but writing is not an error after its pipe's reader or its terminal is gone; a full disk still is one.

    `on_loss` is called when that is noticed. Closing the result leaves the descriptor open. A stream without a
    descriptor is returned as it is.
    """
    try:
        raw = _Outliving(stream.fileno(), on_loss)
    except (OSError, ValueError):
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=True,
    )


def discard(descriptor: int) -> None:
    """Discard what is written to `descriptor` from now on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True
