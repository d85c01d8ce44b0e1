"""Requests to save or stop a run: signals, the end of its launcher, and the files SAVE and STOP in the run folder.

A handler only sets a flag; the ranks reduce the flags at the end of a step, so any one of them may get the signal. A
second signal ends the process at once.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from minimind.distributed.collectives import all_reduce_ints

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SAVE_FILE = "SAVE"
STOP_FILE = "STOP"
# A terminal signals the whole process group and the launcher forwards the same signal: those are one request.
SAME_REQUEST_SECONDS = 1.0


@dataclass(frozen=True)
class Requests:
    """What the ranks agreed on at the end of a step."""

    save: bool = False
    stop: bool = False
    reason: str = ""
    """The signal, file or event, for messages."""


class StopRequests:
    """The requests that this rank has received since the last reduction. Made by `listen`."""

    def __init__(self, run_dir: Path | None, launcher_gone: Callable[[], bool] = lambda: False) -> None:
        self._run_dir = run_dir
        self._launcher_gone = launcher_gone
        self._signal = 0
        self._since = 0.0

    def all_reduce(self, values: tuple[int, ...] = ()) -> tuple[Requests, tuple[int, ...]]:
        """The requests of all ranks together, and the element-wise maximum of `values`. Every rank calls this: one
        collective on host memory, in every step, so it goes over a tree of the ranks.
        """
        # (highest signal, launcher gone, SAVE exists, STOP exists, the caller's values)
        flags = [self._signal, self._launcher_gone(), self._exists(SAVE_FILE), self._exists(STOP_FILE)]
        number, launcher_gone, save, stop, *largest = all_reduce_ints([*flags, *values], torch.maximum)
        if number or launcher_gone:
            reason = signal.Signals(number).name if number else "the end of its launcher"
        else:
            reason = "a file named STOP" if stop else "a file named SAVE"
        must_stop = bool(stop or number or launcher_gone)
        return Requests(bool(save) or must_stop, must_stop, reason), tuple(largest)

    def done(self) -> None:
        """Remove the request files, now carried out. Without a run folder nothing happens."""
        if self._run_dir is not None:
            for name in (SAVE_FILE, STOP_FILE):
                with contextlib.suppress(OSError):
                    (self._run_dir / name).unlink()

    def _exists(self, name: str) -> bool:
        return self._run_dir is not None and (self._run_dir / name).exists()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._signal:
            self._signal, self._since = number, now
            message = f"{signal.Signals(number).name}: finishing the step, then saving; a second signal ends at once\n"
            with contextlib.suppress(OSError):  # standard error may be closed
                os.write(2, message.encode())
        elif now - self._since > SAME_REQUEST_SECONDS:
            os._exit(128 + number)


@contextlib.contextmanager
def listen(run_dir: Path | None, launcher_gone: Callable[[], bool] = lambda: False) -> Iterator[StopRequests]:
    """Take the signals of `SIGNALS` as requests while the block runs, then restore their handlers.

    An ignored SIGHUP stays ignored.

    Args:
        run_dir: where to look for SAVE and STOP; None on every rank but the first.
        launcher_gone: whether what has started this rank has ended, which is a request to stop too.
    """
    requests = StopRequests(run_dir, launcher_gone)
    before: dict[signal.Signals, Callable | int | None] = {}
    with contextlib.suppress(ValueError):  # not the main thread: no signals there, files still work
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # `nohup`: the run survives its terminal
            before[number] = signal.signal(number, requests._handle)
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
