"""End with the launcher: notice that a process which started this rank is gone.

DeepSpeed's launcher is up to four processes between the command that a user typed and a rank, and ending one of them
leaves the others, and the ranks, running. Knows nothing of what stopping means.
"""

import os
import sys
import threading
from collections.abc import Callable, Sequence

import psutil

POLL_SECONDS = 1.0


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
        """Call `on_end` once, from a thread, when a process of the launcher has ended."""
        threading.Thread(target=self._watch, args=(on_end,), name="launcher-watch", daemon=True).start()

    def close(self) -> None:
        """Stop watching."""
        self._ended.set()

    def _watch(self, on_end: Callable[[], None]) -> None:
        while not self._ended.wait(POLL_SECONDS):
            if os.getppid() != self._parent or any(_has_ended(process) for process in self._launcher):
                print("the launcher has ended: finishing the step, then saving", file=sys.stderr, flush=True)
                on_end()
                return


def _has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True
