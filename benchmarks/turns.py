"""Programs that train side by side and take turns: all are started, all but one stand still, each is timed in its turn.

So every one is measured on the whole machine, warm, within the same minutes, and unchanged: a program is only stopped
and continued from outside (SIGSTOP, SIGCONT), and its steps are read from what it prints or logs.
"""

import contextlib
import math
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PATIENCE = 600.0  # seconds without a step, compilation included, after which a program counts as stuck


@dataclass(frozen=True)
class Turn:
    """What one program did in one turn."""

    first: int
    """Number of its first step, as its pattern's group `step` gives it (0 without the group)."""
    steps: int
    wall_seconds: float
    cpu_seconds: float


@dataclass
class Contestant:
    """A program whose lines (or whose log file's) match `pattern` once a step; a group `step` is the step's number.

    Args:
        log: follow this file instead of the program's own output.
        steps: its steps in a turn.
    """

    name: str
    command: Sequence[str]
    pattern: str
    steps: int
    cwd: Path | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    log: Path | None = None
    lines: list[str] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    _process: "subprocess.Popen[str] | None" = None
    _seen: "queue.Queue[tuple[float, int] | None]" = field(default_factory=queue.Queue)

    def start(self) -> None:
        """Start it, in a session of its own so that it can be stopped with all its children."""
        env = {**os.environ, "PYTHONUNBUFFERED": "1", **self.env}
        self._process = subprocess.Popen(
            self.command,
            cwd=self.cwd,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        threading.Thread(target=self._read_output, daemon=True).start()
        if self.log is not None:
            threading.Thread(target=self._follow_log, daemon=True).start()

    def wait_steps(self, count: int) -> tuple[float, int]:
        """Let it make `count` more steps; the time (perf_counter) at which the last was seen, and its number."""
        seen = (0.0, 0)
        for _ in range(count):
            try:
                moment = self._seen.get(timeout=PATIENCE)
            except queue.Empty:
                moment = None
            if moment is None:
                raise SystemExit(f"{self.name} ended or hangs before its step; its last lines:\n{self.tail()}")
            seen = moment
        return seen

    def take_turn(self) -> Turn:
        """Continue it, time `steps` steps, and stop it.

        It was stopped as soon as a step was seen to end, so the next one is whole but for some milliseconds.
        """
        while not self._seen.empty():  # a short step may have ended while it was being stopped
            self._seen.get()
        cpu_began, began = self._cpu_seconds(), time.perf_counter()
        self.send(signal.SIGCONT)
        ended, first = self.wait_steps(1)
        if self.steps > 1:
            ended, _ = self.wait_steps(self.steps - 1)
        self.send(signal.SIGSTOP)
        turn = Turn(first, self.steps, ended - began, self._cpu_seconds() - cpu_began)
        self.turns.append(turn)
        return turn

    def send(self, number: signal.Signals) -> None:
        """Send a signal to it and to everything below it: a launcher gives its ranks sessions of their own."""
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def end(self) -> None:
        """End it and its children."""
        family = self._family()
        for number in (signal.SIGTERM, signal.SIGCONT):
            self.send(number)
        _, left = psutil.wait_procs(family, timeout=20)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self._process is not None:
            self._process.wait()

    def _family(self) -> list[psutil.Process]:
        if self._process is None:
            return []
        try:
            root = psutil.Process(self._process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def tail(self) -> str:
        """Its last lines."""
        return "\n".join(self.lines[-15:])

    def _read_output(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip("\n"))
            if self.log is None:
                self._note(line)
        self._seen.put(None)

    def _follow_log(self) -> None:
        assert self.log is not None and self._process is not None
        while not self.log.exists() and self._process.poll() is None:
            time.sleep(0.05)
        with contextlib.suppress(OSError), open(self.log, encoding="utf-8") as file:
            part = ""
            while self._process.poll() is None:
                part += file.readline()
                if part.endswith("\n"):
                    self._note(part)
                    part = ""
                else:
                    time.sleep(0.01)

    def _note(self, line: str) -> None:
        found = re.search(self.pattern, line)
        if found:
            self._seen.put((time.perf_counter(), int(found.groupdict().get("step") or 0)))

    def _cpu_seconds(self) -> float:
        total = 0.0
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total


@contextlib.contextmanager
def started(contestants: Sequence[Contestant], warm_steps: int = 2) -> Iterator[None]:
    """All of them warm and standing still: each is started alone, makes `warm_steps` steps and is stopped."""
    # Ended from outside, this program must not leave them behind, stopped for ever.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        for contestant in contestants:
            contestant.start()
            contestant.wait_steps(warm_steps)
            contestant.send(signal.SIGSTOP)
            print(f"  {contestant.name}: started and warm", file=sys.stderr, flush=True)
        yield
    finally:
        for contestant in contestants:
            contestant.end()


def take_turns(contestants: Sequence[Contestant], rounds: int, deadline: float = math.inf) -> None:
    """`rounds` times one turn for each, in the same order; results stand in their `turns`.

    Args:
        deadline: time (perf_counter) by which to be done: a round that would take longer is not begun, but for the
            first.
    """
    longest = 0.0
    for number in range(rounds):
        began = time.perf_counter()
        if number and began + longest > deadline:
            print(f"  the time is up after {number} of {rounds} rounds", file=sys.stderr, flush=True)
            return
        for contestant in contestants:
            turn = contestant.take_turn()
            print(
                f"  round {number + 1}: {contestant.name}: {turn.wall_seconds / turn.steps:.3f} s a step "
                f"({turn.cpu_seconds / turn.steps:.3f} s of CPU)",
                file=sys.stderr,
                flush=True,
            )
        longest = max(longest, time.perf_counter() - began)
