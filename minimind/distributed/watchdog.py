"""A rank's line to the others: it tells where it stands, and hears of the first that is gone.

A thread keeps the line, so that it works while the rank itself waits in a collective. When another rank is lost, this
one says which and why and ends; when nothing moves for the time-out, it says where everybody stands and ends. Knows
nothing of what a step is.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from minimind.distributed.watchdog_server import (
    BEAT_SECONDS,
    CUT_SECONDS,
    SILENCE_SECONDS,
    WatchdogServer,
    describe_position,
    encode,
    keep_watch,
)
from minimind.errors import EXIT_LOST, EXIT_USER_ERROR, UserError, first_line

GRACE_SECONDS = 30.0
"""After another rank was lost, this one may still finish what it writes."""
HEARSAY_SECONDS = 5.0
"""A collective that failed may have failed because of a rank that is gone: word of it comes within this time."""
MARGIN_SECONDS = 10.0
"""A collective raises its own error at the time-out; only if it does not, the rank is ended from outside."""


class Watchdog:
    """The line of one rank. Without `connect` it only remembers where the rank stands.

    Args:
        timeout_minutes: how long the rank may stay at one place.
        first: rank 0, as people know it.
        speaks: whether this rank prints that others are silent; one of each host is enough.
    """

    def __init__(
        self,
        rank: int = 0,
        host: str = "",
        timeout_minutes: float = 30.0,
        *,
        first: str = "rank 0",
        speaks: bool = True,
    ) -> None:
        self._rank, self._host, self._first, self._speaks = rank, host, first, speaks
        self._timeout = timeout_minutes * 60
        self._place: tuple[int | None, str, float] = (None, "starting", time.monotonic())
        self._connection: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._sending = threading.Lock()
        self._ended = threading.Event()
        self._is_ending = False
        self._lost = threading.Event()
        self._code = EXIT_LOST
        self._where = ""
        self._answered = threading.Event()

    def report(self, step: int | None, phase: str) -> None:
        """Note where this rank stands: a step, and what it does in it."""
        self._place = (step, phase, time.monotonic())

    @property
    def position(self) -> str:
        """Where this rank stands, in words."""
        return describe_position(*self._place[:2])

    def connect(self, address: str, port: int, token: str) -> None:
        """Join rank 0's server and begin to keep the line.

        Raises:
            OSError: nobody answers there.
        """
        self._connection = socket.create_connection((address, port), timeout=CUT_SECONDS)
        keep_watch(self._connection, min(CUT_SECONDS, self._timeout))
        self._send({"token": token, "rank": self._rank, "host": self._host, "pid": os.getpid()})
        self._thread = threading.Thread(target=self._keep, name="watchdog", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Tell the others when the block fails. An error that follows from another rank's end ends this process with
        that rank's exit code; the line about it has been printed.

        Raises:
            SystemExit: another rank was lost, or a collective timed out.
        """
        try:
            yield
        except UserError as error:
            self._fail(str(error), EXIT_USER_ERROR)
            raise
        except Exception as error:
            self._leave_if_lost()
            message = first_line(error)[:300]
            self._fail(f"{type(error).__name__}: {message}", 1)
            raise
        except BaseException:
            self._fail("it was interrupted", EXIT_LOST)
            raise

    def close(self) -> None:
        """Say farewell. Nothing that happens to others is followed any more."""
        self._is_ending = True
        self._ended.set()
        if self._connection is not None and self._thread is not None:
            self._send({"bye": True})
            self._thread.join(BEAT_SECONDS + 1)
            self._connection.close()

    def _fail(self, reason: str, code: int) -> None:
        self._is_ending = True
        self._send({"failed": reason, "code": code, **self._position()})

    def _leave_if_lost(self) -> None:
        """After a failure: end if it came from another rank, or from the time-out."""
        if self._connection is None:
            return
        if self._lost.wait(HEARSAY_SECONDS):
            raise SystemExit(self._code)
        if time.monotonic() - self._place[2] > 0.9 * self._timeout:
            self._say_that_it_hangs()
            raise SystemExit(EXIT_LOST)

    def _say_that_it_hangs(self) -> None:
        step, phase, since = self._place
        self._send({"where": True})
        where = self._where if self._answered.wait(HEARSAY_SECONDS) else f"{self._first} does not answer"
        reason = (
            f"nothing moved for {time.monotonic() - since:.0f} s at {describe_position(step, phase)} "
            f"(--timeout-minutes {self._timeout / 60:g}); where the ranks stand: {where}"
        )
        self._say(f"error: {reason}; the run continues from its last checkpoint when it is started again")
        self._fail(reason, EXIT_LOST)

    def _position(self) -> dict[str, Any]:
        step, phase, since = self._place
        return {"step": step, "phase": phase, "age": time.monotonic() - since}

    def _say(self, line: str) -> None:
        print(f"rank {self._rank} on {self._host}: {line}", file=sys.stderr, flush=True)

    def _send(self, message: dict[str, Any]) -> None:
        if self._connection is not None:
            with self._sending, contextlib.suppress(OSError):  # the keeping thread reads what became of it
                self._connection.sendall(encode(message))

    def _keep(self) -> None:
        """The thread: beats out, news in."""
        assert self._connection is not None
        self._connection.settimeout(0.5)
        inbox, beat, heard, is_silent = b"", 0.0, time.monotonic(), False
        while not self._ended.is_set():
            now = time.monotonic()
            if now - beat >= BEAT_SECONDS:
                beat = now
                self._send(self._position())
            if now - heard > SILENCE_SECONDS and not is_silent:
                is_silent = True
                self._say(f"{self._first} has been silent for {now - heard:.0f} s: stopped, swapping or cut off")
            if now - self._place[2] > self._timeout + MARGIN_SECONDS and not self._is_ending:
                threading.Thread(target=self._end_hanging, daemon=True).start()
                self._is_ending = True
            try:
                data = self._connection.recv(65536)
            except TimeoutError:
                continue
            except OSError as error:
                if isinstance(error, ConnectionResetError):
                    data = b""
                else:
                    self._end_lost(f"{self._first} is lost: its host is down or cut off ({error.strerror})", None)
                    return
            if not data:
                self._end_lost(f"{self._first} died: its process is gone without a word (killed, or crashed)", None)
                return
            heard = time.monotonic()
            if is_silent:
                is_silent = False
                self._say(f"{self._first} answers again")
            *lines, inbox = (inbox + data).split(b"\n")
            for line in lines:
                if self._understand(json.loads(line)):
                    return

    def _understand(self, message: dict[str, Any]) -> bool:
        """Take one piece of news; whether it was the last."""
        if "say" in message and self._speaks:
            self._say(message["say"])
        if "where" in message:
            self._where = message["where"]
            self._answered.set()
        if "lost" in message and message["rank"] != self._rank:
            self._end_lost(message["lost"], message["code"])
            return True
        return "end" in message

    def _end_lost(self, what: str, code: int | None) -> None:
        """Say who was lost, let the rank's own thread end, and see to it that the process does."""
        if code is not None:
            # Whoever failed said so; where all fail alike, each is on its way out already.
            self._ended.wait(BEAT_SECONDS)
        if self._is_ending or self._ended.is_set():
            return
        self._code = EXIT_LOST if code is None else code
        self._say(f"error: {what}; ending; the run continues from its last checkpoint when it is started again")
        self._lost.set()
        if not self._ended.wait(GRACE_SECONDS):
            os._exit(self._code)

    def _end_hanging(self) -> None:
        self._say_that_it_hangs()
        time.sleep(1.0)
        os._exit(EXIT_LOST)


@contextlib.contextmanager
def hold_watchdog(
    rank: int, host: str, address: str, store: Any, timeout_minutes: float, *, speaks: bool = True
) -> Iterator[Watchdog]:
    """Keep a line between all ranks while the block runs. Every rank calls this.

    Args:
        address: of rank 0's host.
        store: torch's key-value store of the run, in which the ranks find rank 0's port.
        speaks: whether this rank prints that others are silent; one of each host is enough.

    Raises:
        UserError: rank 0's server cannot be reached.
    """
    with contextlib.ExitStack() as stack:
        if rank == 0:
            server = WatchdogServer(os.urandom(16).hex(), cut_seconds=min(CUT_SECONDS, timeout_minutes * 60))
            server.start()
            stack.callback(server.close)
            store.set("watchdog", f"{server.port} {server.token} {os.getpid()} {host}")
        port, token, pid, first_host = store.get("watchdog").decode().split(maxsplit=3)
        line = Watchdog(rank, host, timeout_minutes, first=f"rank 0 on {first_host} (process {pid})", speaks=speaks)
        try:
            line.connect(address, int(port), token)
        except OSError as error:
            raise UserError(
                f"rank {rank} on {host}: rank 0 does not answer at {address} port {port}: {error.strerror or error}; "
                "hosts of a run must reach each other on every port"
            ) from None
        stack.callback(line.close)
        yield line
