"""Notice the end of the launcher: a process that started this rank, or the reader of its output, is gone.

DeepSpeed's launcher is up to four processes between the user's command and a rank; ending one of them leaves the others
and the ranks running. PR_SET_PDEATHSIG would cover only the parent.
"""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

import psutil


class LauncherWatch:
    """Remembers at construction who started this process."""

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._launcher = find_launcher(psutil.Process().parents())
        self._unread, self._told = False, False

    def has_ended(self) -> bool:
        """Whether a process of the launcher has ended, or something was written for a reader who is gone."""
        is_gone = self._unread or os.getppid() != self._parent or any(map(_has_ended, self._launcher))
        if is_gone and not self._told:
            self._told = True
            print("the launcher has ended: this rank finishes the step, then saves", file=sys.stderr, flush=True)
        return is_gone

    @contextlib.contextmanager
    def outlive_readers(self) -> Iterator[None]:
        """In the block, output without a reader is discarded; writing it is no error, then or afterwards."""
        before = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (outlive_reader(stream, self._note_unread) for stream in before)
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            sys.stdout, sys.stderr = before

    def _note_unread(self) -> None:
        self._unread = True


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
        if is_session or any("deepspeed" in word for word in words):
            found.append(process)
        if is_session or process not in found[1:]:
            break
    return found


def _has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True


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
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
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
    buffer = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, encoding=stream.encoding, errors=stream.errors, line_buffering=True)
