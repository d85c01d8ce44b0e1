"""Watchdog: every rank beats in the run's key-value store, so that all learn which rank failed, where and why.

A beat costs O(ranks) messages in all: each rank sets its own key and reads two, and rank 0 alone reads every beat and
publishes a summary. Threads do it, so it works while the rank waits in a collective.
"""

import contextlib
import datetime
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed

from minimind.distributed.heartbeats import (
    CUT_SECONDS,
    LATE_SECONDS,
    SILENCE_SECONDS,
    Loss,
    RankBeats,
    describe_position,
    describe_silence,
    drop_dead_connections,
    open_connections,
)
from minimind.errors import EXIT_LOST, EXIT_USER_ERROR, UserError, first_line

BEAT_SECONDS = 1.0
GRACE_SECONDS = 30.0
"""After another rank was lost, this one may still finish what it writes."""
NEWS_SECONDS = 8.0
"""A collective that failed may have failed because a rank is gone; the news takes two beats and `LATE_SECONDS`."""
MARGIN_SECONDS = 10.0
"""A collective raises its own error at the time-out; only if it does not, the watchdog ends the rank."""
FAREWELL_SECONDS = 5.0
"""How long rank 0, which holds the store, waits at its end for the other ranks to read why."""


class Watchdog:
    """The watchdog of one rank. Without `connect` it only remembers where the rank is.

    Args:
        timeout_minutes: how long the rank may stay at one place.
        is_logger: whether this rank prints that other ranks are silent; one of each host is enough.
    """

    def __init__(self, rank: int = 0, host: str = "", timeout_minutes: float = 30.0, *, is_logger: bool = True) -> None:
        self._rank, self._host, self._is_logger = rank, host, is_logger
        self._name = f"rank {rank} on {host} (process {os.getpid()})"
        self._timeout = self._limit = timeout_minutes * 60
        self._place: tuple[int | None, str] = (None, "starting")
        self._since = time.monotonic()
        self._threads: list[threading.Thread] = []
        self._wake, self._ended, self._told, self._lost = (threading.Event() for _ in range(4))
        self._is_ending = False  # this rank's own end, good or bad: losses are no news any more
        self._own_loss: Loss | None = None
        self._code = EXIT_LOST
        self._summary: dict[str, Any] = {"silent": {}, "where": "", "first": "starting"}
        self._heard = time.monotonic()  # of rank 0

    def report(self, step: int | None, phase: str, *, may_last: bool = False) -> None:
        """Note where this rank is: the step, and what it does in it; whether that may last longer than the time-out."""
        self._place, self._since = (step, phase), time.monotonic()
        self._limit = math.inf if may_last else self._timeout

    @property
    def position(self) -> str:
        """Where this rank is, in words."""
        return describe_position(*self._place)

    def connect(self, store: Any, world_size: int, port: int) -> None:
        """Begin to beat in `store`, whose server listens at `port`. Every rank calls this; it waits for all of them.

        Raises:
            UserError: one of them did not come within the store's time-out.
        """
        shared: Any = torch.distributed.PrefixStore("watchdog", store)
        drop_dead_connections(port, min(CUT_SECONDS, self._timeout))
        if self._rank == 0:
            self._ranks = RankBeats(world_size, port)
            shared.multi_set([*self._ranks.keys, "lost", "summary"], [""] * (world_size + 2))
            shared.set("first", self._name)
        self._first = shared.get("first").decode()
        # A connection of its own: one that waits for an answer is locked for every thread. Without a limit, as an
        # answer may take as long as rank 0 is suspended.
        before = open_connections(port)
        self._store = shared.clone()
        self._store.set_timeout(datetime.timedelta(days=365))
        addresses = [address for address in open_connections(port) if address not in before]
        self._beat: dict[str, Any] = {"name": self._name, "addresses": addresses, "count": 0}
        self._send_beat(ended=False)
        # Rank 0 sees every connection before a rank goes on: from now on one that dies is missed, not merely silent.
        if shared.add("came", 1) == world_size:
            shared.set("all came", "")
        try:
            if self._rank == 0:
                shared.wait(["all came"])
                self._ranks.look(self._store)
                shared.set("met", "")
            shared.wait(["met"])
        except torch.distributed.DistError as error:
            raise UserError(f"{self._name}: a rank was lost at the start ({first_line(error)[:120]})") from None
        self._heard = time.monotonic()
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._keep_beating, self._watch_itself)
        ]
        for thread in self._threads:
            thread.start()

    @contextlib.contextmanager
    def report_failure(self) -> Iterator[None]:
        """Tell the other ranks when the block fails. An error that follows from another rank's end ends this process
        with that rank's exit code; the line about it has been printed.

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
            self._fail(f"{type(error).__name__}: {first_line(error)[:300]}", 1)
            raise
        except BaseException:
            self._fail("it was interrupted", EXIT_LOST)
            raise

    def close(self) -> None:
        """Tell the other ranks that this is an orderly end, and stop watching."""
        self._is_ending = True
        self._ended.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(FAREWELL_SECONDS + 2)

    def _fail(self, reason: str, code: int) -> None:
        self._is_ending = True
        self._own_loss = Loss(self._rank, f"{self._name} failed: {reason}; it was at {self.position}", code)
        self._wake.set()
        if self._threads:  # the thread may hang in the store if rank 0 is stopped
            self._told.wait(FAREWELL_SECONDS)

    def _leave_if_lost(self) -> None:
        """After a failure: end if it came from another rank, or from the time-out."""
        if not self._threads:
            return
        if self._lost.wait(NEWS_SECONDS):
            raise SystemExit(self._code)
        if time.monotonic() - self._since > 0.9 * self._timeout:
            self._end_hanging()
            raise SystemExit(EXIT_LOST)

    def _end_hanging(self) -> None:
        answers = self._rank == 0 or time.monotonic() - self._heard < SILENCE_SECONDS
        reason = (
            f"nothing moved for {time.monotonic() - self._since:.0f} s at {self.position} (--timeout-minutes "
            f"{self._timeout / 60:g}); ranks: {self._summary['where'] if answers else f'{self._first} does not answer'}"
        )
        self._log(f"error: {reason}; the run continues from its last checkpoint when it is started again")
        self._fail(reason, EXIT_LOST)

    def _log(self, line: str) -> None:
        print(f"rank {self._rank} on {self._host}: {line}", file=sys.stderr, flush=True)

    def _watch_itself(self) -> None:
        """A thread: end a rank that hangs, and name rank 0 when it is silent. Never waits for the store."""
        last, is_silent = time.monotonic(), False
        while not self._ended.wait(0.5):
            now = time.monotonic()
            if now - last > LATE_SECONDS:
                # This process was suspended, or Python was locked: the others' beats and the time here do not count.
                self._since += now - last
                self._heard += now - last
            last = now
            silence = now - self._heard
            if self._is_logger and self._rank and is_silent != (silence > SILENCE_SECONDS) and not self._is_ending:
                is_silent = not is_silent
                self._log(describe_silence(self._first, silence) if is_silent else f"{self._first} answers again")
            if now - self._since > self._limit + MARGIN_SECONDS and not self._is_ending:
                self._end_hanging()
                self._ended.set()
                self._threads[0].join(FAREWELL_SECONDS + 2)
                os._exit(EXIT_LOST)

    def _keep_beating(self) -> None:
        """A thread: beats out, news in."""
        deadline = None
        try:
            while True:
                self._wake.clear()
                ended = self._ended.is_set()  # asked once: the last beat has to say so
                if not self._exchange(ended):
                    return
                if ended:
                    deadline = deadline or time.monotonic() + FAREWELL_SECONDS
                    if self._rank or self._ranks.all_ended or time.monotonic() > deadline:
                        return
                    time.sleep(0.05)
                else:
                    self._wake.wait(BEAT_SECONDS)
        except torch.distributed.DistError as error:
            if not self._ended.is_set():
                what = f"died: its process is gone (killed or crashed), or its host is down ({first_line(error)[:120]})"
                self._end_lost(Loss(0, f"{self._first} {what}; it was at {self._summary['first']}"))

    def _exchange(self, ended: bool) -> bool:
        """One beat, which says whether this rank has `ended`; whether there is reason for another one."""
        if self._own_loss is not None and not self._told.is_set():
            self._announce(self._own_loss)
            self._told.set()
        self._send_beat(ended)
        if self._rank == 0:
            found, summary = self._ranks.look(self._store)
            if found is not None:
                self._announce(found)
            self._store.set("summary", json.dumps({**summary, "first": self.position, "ended": ended}))
        summary_now, lost = (json.loads(value or "{}") for value in self._store.multi_get(["summary", "lost"]))
        if summary_now and summary_now["count"] != self._summary.get("count"):
            self._heard = time.monotonic()
            self._log_silence(self._summary["silent"], summary_now["silent"])
            self._summary = summary_now
        is_last = bool(self._rank and (lost or self._summary.get("ended")))
        if is_last:
            self._send_beat(ended=True)  # rank 0 need not wait for this one
            self._heard = math.inf  # rank 0 may be silent from now on
        if lost and lost["rank"] != self._rank and not self._lost.is_set():
            self._end_lost(Loss(**lost))
        return not is_last

    def _send_beat(self, ended: bool) -> None:
        (step, phase), seconds = self._place, round(time.monotonic() - self._since)
        self._beat |= {"step": step, "phase": phase, "seconds": seconds, "ended": ended}
        self._beat["count"] += 1
        self._store.set(f"beat/{self._rank}", json.dumps(self._beat))

    def _announce(self, loss: Loss) -> None:
        self._store.compare_set("lost", "", json.dumps(vars(loss)))  # the first loss is the cause of the others

    def _log_silence(self, before: dict[str, str], now: dict[str, str]) -> None:
        if self._is_logger:
            for name in now.keys() - before.keys() - {self._name}:
                self._log(now[name])
            for name in before.keys() - now.keys() - {self._name}:
                self._log(f"{name} answers again")

    def _end_lost(self, loss: Loss) -> None:
        """Log the loss, let the rank's main thread end, and after `GRACE_SECONDS` end the process."""
        if loss.code is not None:
            # The failing rank has logged the cause; if every rank fails alike, they are all exiting already.
            self._ended.wait(2 * BEAT_SECONDS)
        if self._is_ending:
            return
        self._code = EXIT_LOST if loss.code is None else loss.code
        where = f"; ranks: {self._summary['where']}" if self._summary["where"] else ""
        self._log(
            f"error: {loss.reason}{where}; ending; the run continues from its last checkpoint when it is started again"
        )
        self._lost.set()
        threading.Thread(target=self._end_late, daemon=True).start()

    def _end_late(self) -> None:
        if not self._ended.wait(GRACE_SECONDS):
            os._exit(self._code)
