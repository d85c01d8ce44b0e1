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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 600.0  # seconds without a step, compilation included, after which a program counts as stuck


@dataclass
class Contestant:
    """A program whose lines (or whose log file's) match `pattern` once a step.

    Args:
        log: follow this file instead of the program's own output.
        steps: its steps in a turn.
        seconds: of a step, turn by turn.
    """

    name: str
    command: Sequence[str]
    pattern: str
    steps: int
    cwd: Path | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    log: Path | None = None
    seconds: list[float] = field(default_factory=list)
    _process: Any = None  # from `start` on
    _output: Any = None
    _offset: int = 0  # bytes of the log, or of the output, that have been read

    def start(self) -> None:
        """Start it, in a session of its own so that it can be stopped with all its children."""
        self._output = tempfile.NamedTemporaryFile(prefix="turns-")  # noqa: SIM115 - closed by `end`
        env = {**os.environ, "PYTHONUNBUFFERED": "1", **self.env}
        self._process = subprocess.Popen(
            self.command, cwd=self.cwd, env=env, stdout=self._output, stderr=subprocess.STDOUT, start_new_session=True
        )

    def wait_steps(self, count: int) -> float:
        """Wait for `count` more steps; the time (perf_counter) at which the last was seen."""
        moment = time.perf_counter()
        while count > 0:
            has_ended = self._process.poll() is not None
            new = self._read_steps()
            if new:
                count, moment = count - new, time.perf_counter()
            elif has_ended or time.perf_counter() - moment > PATIENCE:
                last = "\n".join(Path(self._output.name).read_text(errors="replace").splitlines()[-15:])
                raise SystemExit(f"{self.name} ended or hangs before its step; its last lines:\n{last}")
            else:
                time.sleep(0.005)
        return moment

    def take_turn(self) -> None:
        """Continue it, time `steps` steps, and stop it.

        It was stopped as soon as a step was seen to end, so the next one is complete but for some milliseconds.
        """
        self._read_steps()  # a short step may have ended while it was being stopped
        began = time.perf_counter()
        self.send(signal.SIGCONT)
        self.seconds.append((self.wait_steps(self.steps) - began) / self.steps)
        self.send(signal.SIGSTOP)

    def finish(self) -> None:
        """Let it go on to its own end, which is this program's too if it fails."""
        self.send(signal.SIGCONT)
        if self._process.wait():
            raise SystemExit(f"{self.name} failed:\n{Path(self._output.name).read_text(errors='replace')[-800:]}")

    def send(self, number: signal.Signals) -> None:
        """Send a signal to it and all its descendants: a launcher gives its ranks sessions of their own."""
        send(family(self._process.pid), number)

    def end(self) -> None:
        """End it and its children."""
        end_family(self._process.pid, patience=20)
        self._process.wait()
        self._output.close()

    def _read_steps(self) -> int:
        """How many steps are in the lines that have come since the last call."""
        path = self.log or Path(self._output.name)
        if not path.exists():
            return 0
        with path.open("rb") as file:
            file.seek(self._offset)
            lines = file.read().rpartition(b"\n")[0]
        self._offset += len(lines) + 1 if lines else 0
        return sum(re.search(self.pattern, line) is not None for line in lines.decode(errors="replace").splitlines())


def family(pid: int) -> list[psutil.Process]:
    """A process and all its descendants; none if it is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [(root := psutil.Process(pid)), *root.children(recursive=True)]
    return []


def send(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    """Send a signal to those that are still there."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def end_family(pid: int, patience: float) -> None:
    """End a process and all its descendants, stopped ones too; after `patience` seconds kill what is left."""
    members = family(pid)
    for number in (signal.SIGTERM, signal.SIGCONT):
        send(members, number)
    send(psutil.wait_procs(members, patience)[1], signal.SIGKILL)


@contextlib.contextmanager
def started(contestants: Sequence[Contestant], warm_steps: int = 2) -> Iterator[float]:
    """All of them warm and standing still: each is started alone, makes `warm_steps` steps and is stopped.

    Yields the time (perf_counter) of the first start.
    """
    # Ended from outside, this program must not leave them behind, stopped for ever.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        for contestant in contestants:
            contestant.start()
            stack.callback(contestant.end)
            contestant.wait_steps(warm_steps)
            contestant.send(signal.SIGSTOP)
            print(f"  {contestant.name}: started and warm", file=sys.stderr, flush=True)
        yield began


def take_turns(contestants: Sequence[Contestant], rounds: int, deadline: float = math.inf) -> None:
    """Give each one turn in each round, in the same order. No round but the first begins that, as long as the longest,
    would end after `deadline`."""
    longest = 0.0
    for number in range(rounds):
        began = time.perf_counter()
        if number and began + longest > deadline:
            print(f"  the time is up after {number} of {rounds} rounds", file=sys.stderr, flush=True)
            return
        for contestant in contestants:
            contestant.take_turn()
            found = f"{contestant.name}: {contestant.seconds[-1]:.3f} s a step"
            print(f"  round {number + 1}: {found}", file=sys.stderr, flush=True)
        longest = max(longest, time.perf_counter() - began)


def our_trainer(
    name: str, run_dir: Path, flags: Sequence[object], steps: int, env: Mapping[str, str], launcher: Sequence[str] = ()
) -> Contestant:
    """`python -m minimind.train` without an end, under ZeRO-1 with document masks, and AdamW as in what it is compared
    with."""
    command = [*(launcher or [sys.executable]), "-m", "minimind.train", "--run-dir", run_dir, "--steps", 100000]
    command += ["--document-mask", "--optimizer", "adamw", "--ds-config", ROOT / "ds_configs" / "zero1.json", *flags]
    pattern = r'"step": \d+, "loss"'
    return Contestant(name, [*map(str, command)], pattern, steps, ROOT, env, run_dir / "metrics.jsonl")
