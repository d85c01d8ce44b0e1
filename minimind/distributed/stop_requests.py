"""Requests from outside a run: signals, and the files SAVE and STOP in the run folder.

A handler only sets a flag; the ranks agree on it at the end of a step, so it does not matter which of them was told. A
second signal ends the process at once. Knows nothing of what saving is.
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

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SAVE_FILE = "SAVE"
STOP_FILE = "STOP"
# A terminal signals the whole process group, and the launcher passes the same on: those are one request.
SAME_REQUEST_SECONDS = 1.0


@dataclass(frozen=True)
class Requests:
    """What the ranks agreed on at the end of a step."""

    save: bool = False
    stop: bool = False
    reason: str = ""
    """Who asked, in words."""


class Outside:
    """What was asked of this rank since the last agreement. Made by `listen`."""

    def __init__(self, run_dir: Path | None) -> None:
        self._run_dir = run_dir
        self._signal = 0
        self._since = 0.0
        self._is_abandoned = False

    def abandon(self) -> None:
        """Ask to stop because nobody waits for this run any more; no signal, so the first one is still a request."""
        self._is_abandoned = True

    def agree(self, values: tuple[int, ...] = ()) -> tuple[Requests, tuple[int, ...]]:
        """What any rank was asked, and the element-wise largest of `values`. Every rank calls this: one collective.

        Only host memory is touched, so the device goes on with what it was given.
        """
        files = self._look()
        # (highest signal, launcher gone, SAVE there, STOP there, the caller's values)
        tensor = torch.tensor([self._signal, int(self._is_abandoned), *files, *values], dtype=torch.int64)
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
        number, abandoned, save, stop, *largest = tensor.tolist()
        if number or abandoned:
            reason = signal.Signals(number).name if number else "the end of its launcher"
        else:
            reason = "a file named STOP" if stop else "a file named SAVE"
        must_stop = bool(stop or number or abandoned)
        return Requests(bool(save) or must_stop, must_stop, reason), tuple(largest)

    def done(self) -> None:
        """The requests of the files were carried out: remove them. A rank without a run folder does nothing."""
        if self._run_dir is not None:
            for name in (SAVE_FILE, STOP_FILE):
                with contextlib.suppress(OSError):
                    (self._run_dir / name).unlink()

    def _look(self) -> tuple[int, int]:
        if self._run_dir is None:
            return 0, 0
        return int((self._run_dir / SAVE_FILE).exists()), int((self._run_dir / STOP_FILE).exists())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._signal:
            self._signal, self._since = number, now
            message = f"{signal.Signals(number).name}: finishing the step, then saving; a second signal ends at once\n"
            with contextlib.suppress(OSError):  # nobody may be left to read it
                os.write(2, message.encode())
        elif now - self._since > SAME_REQUEST_SECONDS:
            os._exit(128 + number)


@contextlib.contextmanager
def listen(run_dir: Path | None) -> Iterator[Outside]:
    """Take the signals of `SIGNALS` as requests while the block runs; afterwards they mean what they meant before.

    SIGHUP stays ignored where it was.

    Args:
        run_dir: where to look for SAVE and STOP; None on every rank but the first.
    """
    outside = Outside(run_dir)
    before: dict[signal.Signals, Callable | int | None] = {}
    with contextlib.suppress(ValueError):  # not the main thread: no signals there, files still work
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # `nohup`: the end of the terminal is no end of the run
            before[number] = signal.signal(number, outside._handle)
    try:
        yield outside
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
