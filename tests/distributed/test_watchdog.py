"""The watchdog on real processes: who died, who failed, who is silent, and what hangs, each told to the others."""

import contextlib
import datetime
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from training_runs import PRELOAD

from minimind.distributed import heartbeats, watchdog
from minimind.distributed.heartbeats import describe_ranks
from minimind.distributed.launchers.local import find_free_port
from minimind.distributed.watchdog import Watchdog
from minimind.errors import UserError, run_main

SILENCE_SECONDS = 4.0
NEWS_SECONDS = 5.0  # two beats, and what a beat may be late
MARGIN_SECONDS = 5.0


def live(rank: int, world_size: int, port: int, minutes: float, what: str, log: Path, pipe: Connection) -> None:
    """One rank, in its own process; its output goes into a file."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    heartbeats.SILENCE_SECONDS = watchdog.SILENCE_SECONDS = SILENCE_SECONDS
    watchdog.NEWS_SECONDS, watchdog.MARGIN_SECONDS = NEWS_SECONDS, MARGIN_SECONDS
    limit = datetime.timedelta(seconds=60)
    store = torch.distributed.TCPStore("127.0.0.1", port, world_size, rank == 0, limit, wait_for_workers=False)
    own = Watchdog(rank, f"n{rank}", minutes)
    own.connect(store, world_size, port)
    own.report(rank + 1, "optimizer step", may_last=what == "compile")
    pipe.send("ready")

    def work() -> None:
        with contextlib.closing(own), own.report_failure():
            pipe.recv()
            if what == "fail":
                raise UserError("the disk is full")
            if what == "crash":
                raise ZeroDivisionError("a bug")
            if what == "collective":
                time.sleep(min(60 * minutes, 2) + 3)  # a rank that fails says so before, on busy cores too
                raise RuntimeError("timed out")

    run_main(work)


@dataclass
class Rank:
    process: Any
    log: Path
    pipe: Connection

    @property
    def name(self) -> str:
        return f"(process {self.process.pid})"

    def go(self) -> None:
        """Let it do what it was started for, or end."""
        self.pipe.send("go")

    def end(self) -> tuple[int, str]:
        """Its exit code, and all that it said."""
        self.process.join(60)
        assert self.process.exitcode is not None, self.log.read_text()
        return self.process.exitcode, self.log.read_text()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def says(self, words: str) -> str:
        """The line with these words, once there is one."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for line in self.log.read_text().splitlines():
                if words in line:
                    return line
            time.sleep(0.05)
        raise AssertionError(f"{words!r} is not in:\n{self.log.read_text()}")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., list[Rank]]]:
    """Starts a run of as many ranks as it gets words, each saying what the rank does."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    ranks: list[Rank] = []

    def begin(*whats: str, minutes: float = 30.0) -> list[Rank]:
        port = find_free_port()
        for rank, what in enumerate(whats):
            here, there = context.Pipe()
            log = tmp_path / f"rank{rank}"
            process = context.Process(target=live, args=(rank, len(whats), port, minutes, what, log, there))
            process.start()
            ranks.append(Rank(process, log, here))
        for rank in ranks:
            assert rank.pipe.poll(60) and rank.pipe.recv() == "ready"
        return ranks

    yield begin
    for rank in ranks:
        rank.process.kill()
        rank.process.join()


@pytest.mark.parametrize("killed", [0, 1])  # rank 0 holds the store
def test_a_killed_rank_is_named_with_its_place_by_every_other(start, killed):
    ranks = start("wait", "wait", "wait")
    time.sleep(3)
    ranks[killed].signal(signal.SIGKILL)
    began = time.monotonic()
    for rank in {0, 1, 2} - {killed}:
        line = ranks[rank].says("error: ")
        assert f"rank {rank} on n{rank}: error: rank {killed} on n{killed} {ranks[killed].name} died: " in line
        assert f"rank {killed} at step {killed + 1}, optimizer step" in line
        assert f"it was at step {killed + 1}, optimizer step" in line
        assert "rank 2 at step 3, optimizer step" in line
    assert time.monotonic() - began < 15


def test_a_rank_that_is_killed_before_its_second_beat_is_named(start):
    ranks = start("wait", "wait")
    ranks[1].signal(signal.SIGKILL)
    assert f"rank 1 on n1 {ranks[1].name} died: " in ranks[0].says("error: ")


def test_a_rank_that_never_comes_is_a_line_and_no_traceback():
    port = find_free_port()
    limit = datetime.timedelta(seconds=1)
    store = torch.distributed.TCPStore("127.0.0.1", port, 2, True, limit, wait_for_workers=False)
    with pytest.raises(UserError, match=r"^rank 0 on n0 \(process \d+\): a rank was lost at the start"):
        Watchdog(0, "n0").connect(store, 2, port)


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize(
    ("what", "code", "words"), [("fail", 2, "failed: the disk is full"), ("crash", 1, "ZeroDivisionError: a bug")]
)
def test_a_rank_that_fails_says_why_and_its_code_is_everybody_s(start, failing, what, code, words):
    ranks = start(*(what if rank == failing else "collective" for rank in range(2)))
    for rank in ranks:
        rank.go()
    assert ranks[failing].end()[0] == code
    found, said = ranks[1 - failing].end()
    assert found == code and f"rank {failing} on n{failing} {ranks[failing].name} " in said and words in said
    assert f"it was at step {failing + 1}, optimizer step" in said and "Traceback" not in said


def test_ranks_that_fail_alike_do_not_blame_each_other(start):
    ranks = start("fail", "fail", "fail")
    for rank in ranks:
        rank.go()
    assert [rank.end() for rank in ranks] == [(2, "error: the disk is full\n")] * 3


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_and_nobody_ends(start, stopped):
    ranks = start("wait", "wait")
    other = ranks[1 - stopped]
    ranks[stopped].signal(signal.SIGSTOP)
    line = other.says(f"rank {stopped} on n{stopped} ")
    assert "has been silent" in line and "stopped" in line
    ranks[stopped].signal(signal.SIGCONT)
    other.says("answers again")
    for rank in reversed(ranks):
        rank.go()
        assert rank.end()[0] == 0


def test_a_job_that_is_suspended_as_a_whole_goes_on(start):
    ranks = start("wait", "wait", minutes=0.01)  # with the margin: 5.6 s
    for rank in ranks:
        rank.signal(signal.SIGSTOP)
    time.sleep(7)
    for rank in ranks:
        rank.signal(signal.SIGCONT)
    time.sleep(2)
    for rank in reversed(ranks):
        rank.go()
        assert rank.end() == (0, "")


def test_a_collective_that_times_out_says_where_everybody_is(start):
    first, _ = start("collective", "wait", minutes=0.05)
    first.go()
    code, said = first.end()
    assert code == 76 and "nothing moved for" in said and "(--timeout-minutes 0.05)" in said
    assert "rank 0 at step 1, optimizer step for " in said and "rank 1 at step 2, optimizer step" in said
    assert "Traceback" not in said


def test_a_rank_that_hangs_without_an_error_is_ended(start):
    ranks = start("wait", "wait", minutes=0.01)
    for rank in ranks:
        code, said = rank.end()
        assert code == 76 and ("nothing moved for" in said)


def test_what_may_last_is_not_ended(start):
    ranks = start("compile", "compile", minutes=0.01)  # with the margin: 5.6 s
    time.sleep(8)
    for rank in reversed(ranks):
        rank.go()
        assert rank.end() == (0, "")


@pytest.mark.parametrize("first", [0, 1])
def test_an_orderly_end_is_no_death(start, first):
    ranks = start("wait", "wait")
    ranks[first].go()
    assert ranks[first].end() == (0, "")
    time.sleep(4)
    ranks[1 - first].go()
    assert ranks[1 - first].end() == (0, "")


def test_ranks_are_written_short():
    assert describe_ranks([5, 0, 1, 2]) == "0-2, 5"
    assert describe_ranks([]) == ""
    assert describe_ranks([0, 1, 3, 5], 2) == "0-1, 3 and more, 4 in all,"
