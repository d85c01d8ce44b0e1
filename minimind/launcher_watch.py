"""End with the launcher: notice that a process which started this rank, or whoever read its output, is gone.

DeepSpeed's launcher is up to four processes between the command that a user typed and a rank, and ending one of them
leaves the others, and the ranks, running. Knows nothing of what stopping means.
"""

import contextlib
import os
import select
import stat
import sys
import threading
from collections.abc import Callable, Sequence

import psutil

POLL_SECONDS = 0.5


def find_launcher(ancestors: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The processes that started this rank and must outlive it, nearest first.

    The parent, and above it every process of DeepSpeed's: the launcher of the host, the shell that ssh runs it in with
    the session of sshd over that, or the `deepspeed` command itself.
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
    """Remembers who started this process, and later watches them; make it early, start it when stopping is possible."""

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._launcher = find_launcher(psutil.Process().parents())
        self._ended = threading.Event()

    def start(self, on_end: Callable[[], None]) -> None:
        """Call `on_end` once, from a thread, when a process of the launcher or the reader of the output has ended.

        Output that nobody reads then goes nowhere, so that writing it is no error.
        """
        threading.Thread(target=self._watch, args=(on_end,), name="launcher-watch", daemon=True).start()

    def close(self) -> None:
        """Stop watching."""
        self._ended.set()

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
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            is_gone = os.getppid() != self._parent or any(_has_ended(process) for process in self._launcher)
            if not is_told and (broken or is_gone):
                is_told = True
                on_end()
                with contextlib.suppress(OSError):
                    print("the launcher has ended: finishing the step, then saving", file=sys.stderr, flush=True)


def _has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True
