"""Programs that train side by side and take turns: all are started, all but one stand still, each is timed in its turn.

A program is only stopped and continued from outside (SIGSTOP, SIGCONT), and its steps are read from what it logs.
"""

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from harness import ROOT

PATIENCE = 600.0  # seconds without a step, compilation included, after which a program counts as stuck


@dataclass(frozen=True)
class Turn:
    """One turn of one program. `first`: number of its first step, from the group `step` of its pattern (else 0)."""

    first: int
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
    turns: list[Turn] = field(default_factory=list)
    _process: "subprocess.Popen[bytes] | None" = None
    _output: Any = None
    _offset: int = 0  # bytes of the log, or of the output, that have been read

    @property
    def seconds(self) -> list[float]:
        """Of a step, turn by turn."""
        return [turn.wall_seconds / turn.steps for turn in self.turns]

    @property
    def cpu_seconds(self) -> list[float]:
        """Processor time of a step, turn by turn."""
        return [turn.cpu_seconds / turn.steps for turn in self.turns]

    def start(self) -> None:
        """Start it, in a session of its own so that it can be stopped with all its children."""
        self._output = tempfile.NamedTemporaryFile(prefix="turns-")  # noqa: SIM115 - closed by `end`
        env = {**os.environ, "PYTHONUNBUFFERED": "1", **self.env}
        self._process = subprocess.Popen(
            self.command, cwd=self.cwd, env=env, stdout=self._output, stderr=subprocess.STDOUT, start_new_session=True
        )

    def wait_steps(self, count: int) -> tuple[float, int]:
        """Wait for `count` more steps: the time (perf_counter) at which the last was seen, and the first's number."""
        assert self._process is not None
        steps, moment = [], time.perf_counter()
        while len(steps) < count:
            has_ended = self._process.poll() is not None
            new = self._read_steps()
            if new:
                steps, moment = steps + new, time.perf_counter()
            elif has_ended or time.perf_counter() - moment > PATIENCE:
                last = "\n".join(Path(self._output.name).read_text(errors="replace").splitlines()[-15:])
                raise SystemExit(f"{self.name} ended or hangs before its step; its last lines:\n{last}")
            else:
                time.sleep(0.005)
        return moment, steps[0]

    def take_turn(self) -> Turn:
        """Continue it, time `steps` steps, and stop it.

        It was stopped as soon as a step was seen to end, so the next one is complete but for some milliseconds.
        """
        self._read_steps()  # a short step may have ended while it was being stopped
        cpu_began, began = self._cpu_time(), time.perf_counter()
        self.send(signal.SIGCONT)
        ended, first = self.wait_steps(self.steps)
        self.send(signal.SIGSTOP)
        self.turns.append(Turn(first, self.steps, ended - began, self._cpu_time() - cpu_began))
        return self.turns[-1]

    def finish(self) -> None:
        """Let it go on to its own end.

        Raises:
            SystemExit: it fails, with its last words.
        """
        assert self._process is not None
        self.send(signal.SIGCONT)
        if self._process.wait():
            raise SystemExit(f"{self.name} failed:\n{Path(self._output.name).read_text(errors='replace')[-800:]}")

    def send(self, number: signal.Signals) -> None:
        """Send a signal to it and all its descendants: a launcher gives its ranks sessions of their own."""
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def end(self) -> None:
        """End it and its children."""
        family = self._family()
        for number in (signal.SIGTERM, signal.SIGCONT):
            self.send(number)
        for process in psutil.wait_procs(family, timeout=20)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self._process is not None:
            self._process.wait()
            self._output.close()

    def _family(self) -> list[psutil.Process]:
        return [] if self._process is None else family(self._process.pid)

    def _read_steps(self) -> list[int]:
        """The numbers of the steps in the lines that have come since the last call."""
        path = self.log or Path(self._output.name)
        if not path.exists():
            return []
        with path.open("rb") as file:
            file.seek(self._offset)
            lines = file.read().rpartition(b"\n")[0]
        self._offset += len(lines) + 1 if lines else 0
        found = (re.search(self.pattern, line) for line in lines.decode(errors="replace").splitlines())
        return [int(match.groupdict().get("step") or 0) for match in found if match]

    def _cpu_time(self) -> float:
        return sum_up(self._family(), lambda process: sum(process.cpu_times()[:2]))


def family(pid: int) -> list[psutil.Process]:
    """A process and all its descendants; none if it is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [(root := psutil.Process(pid)), *root.children(recursive=True)]
    return []


def sum_up(processes: Sequence[psutil.Process], read: Callable[[psutil.Process], float]) -> float:
    """Of those that are still there."""
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += read(process)
    return total


@contextlib.contextmanager
def started(contestants: Sequence[Contestant], warm_steps: int = 2) -> Iterator[float]:
    """All of them warm and standing still: each is started alone, makes `warm_steps` steps and is stopped.

    Yields the time (perf_counter) of the first start.
    """
    # Ended from outside, this program must not leave them behind, stopped for ever.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    began = time.perf_counter()
    try:
        for contestant in contestants:
            contestant.start()
            contestant.wait_steps(warm_steps)
            contestant.send(signal.SIGSTOP)
            print(f"  {contestant.name}: started and warm", file=sys.stderr, flush=True)
        yield began
    finally:
        for contestant in contestants:
            contestant.end()


def take_turns(contestants: Sequence[Contestant], rounds: int, deadline: float = math.inf) -> None:
    """Give each one turn in each round, in the same order; the results are their `turns`."""
    for number in rounds_before(deadline, rounds):
        for contestant in contestants:
            contestant.take_turn()
            found = f"{contestant.seconds[-1]:.3f} s a step ({contestant.cpu_seconds[-1]:.3f} s of CPU)"
            print(f"  round {number + 1}: {contestant.name}: {found}", file=sys.stderr, flush=True)


def rounds_before(deadline: float, rounds: int) -> Iterator[int]:
    """Numbers of rounds; none begins that, as long as the longest, would end after `deadline`, but for the first."""
    longest = 0.0
    for number in range(rounds):
        began = time.perf_counter()
        if number and began + longest > deadline:
            print(f"  the time is up after {number} of {rounds} rounds", file=sys.stderr, flush=True)
            return
        yield number
        longest = max(longest, time.perf_counter() - began)


def our_trainer(
    name: str, run_dir: Path, flags: Sequence[object], steps: int, env: Mapping[str, str], launcher: Sequence[str] = ()
) -> Contestant:
    """`train_command` without an end."""
    command = train_command(run_dir, "--steps", 100000, *flags, launcher=launcher)
    pattern = r'"step": (?P<step>\d+), "loss"'
    return Contestant(name, command, pattern, steps, ROOT, env, run_dir / "metrics.jsonl")


def train_command(run_dir: Path, *flags: object, launcher: Sequence[str] = ()) -> list[str]:
    """`python -m minimind.train` under ZeRO-1 with document masks, and AdamW as in what it is compared with."""
    command = [*(launcher or [sys.executable]), "-m", "minimind.train", "--run-dir", run_dir, "--document-mask"]
    return list(map(str, [*command, "--optimizer", "adamw", "--ds-config", ROOT / "ds_configs" / "zero1.json", *flags]))
