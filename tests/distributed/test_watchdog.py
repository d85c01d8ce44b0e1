"""The line between ranks: who died, who failed, who is merely silent, and what hangs, each told to the others."""

import signal
import socket
import subprocess
import sys
import time

import pytest
from repository import ROOT

from minimind.distributed import watchdog_server as watchdog_server
from minimind.distributed.watchdog import Watchdog
from minimind.distributed.watchdog_server import WatchdogServer, describe_ranks, encode

RANK = """
import sys, time
from minimind.distributed.watchdog import Watchdog
from minimind.errors import UserError
rank, port, minutes, what = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
line = Watchdog(rank, f"n{rank}", minutes)
line.connect("127.0.0.1", port, "secret")
line.report(rank + 1, "optimizer step")
print("ready", flush=True)
with line.reporting():
    if what == "fail":
        time.sleep(3)
        raise UserError("the disk is full")
    if what == "crash":
        raise ZeroDivisionError("a bug")
    if what == "collective":
        time.sleep(60 * minutes + 1)
        raise RuntimeError("timed out")
    sys.stdin.readline()
line.close()
"""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(watchdog_server, "SILENCE_SECONDS", 3.0)
    found = WatchdogServer("secret")
    found.start()
    yield found
    found.close()


@pytest.fixture
def start(server):
    started = []

    def begin(rank: int, what: str = "wait", minutes: float = 30.0) -> subprocess.Popen:
        words = [sys.executable, "-c", RANK, str(rank), str(server.port), str(minutes), what]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(words, cwd=ROOT, text=True, **pipes)
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def end(process: subprocess.Popen) -> tuple[int, str]:
    """Let a waiting rank finish; its code and what it said."""
    try:
        _, said = process.communicate("\n", timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, said


def test_a_killed_rank_is_named_with_its_place_and_the_others_end(start, monkeypatch):
    first, second = start(0), start(1)
    time.sleep(watchdog_server.BEAT_SECONDS + 1)
    second.kill()
    for line in iter(first.stderr.readline, ""):
        if "error: " in line:
            break
    assert f"rank 0 on n0: error: rank 1 on n1 (process {second.pid}) died: its process is gone" in line
    assert "it stood at step 2, optimizer step; the others: rank 0 at step 1, optimizer step" in line


@pytest.mark.parametrize(
    ("what", "code", "words"), [("fail", 2, "failed: the disk is full"), ("crash", 1, "ZeroDivisionError: a bug")]
)
def test_a_rank_that_fails_says_why_and_its_code_is_everybody_s(start, what, code, words):
    first, second = start(0, "collective", 0.15), start(1, what)
    assert end(second)[0] == 1
    found, said = end(first)
    assert found == code and f"rank 1 on n1 (process {second.pid}) " in said and words in said
    assert "Traceback" not in said


def test_a_stopped_rank_is_named_and_nobody_ends(start):
    first, second = start(0), start(1)
    second.send_signal(signal.SIGSTOP)
    line = first.stderr.readline()
    assert "rank 1 on n1" in line and "has been silent" in line and "stopped" in line
    second.send_signal(signal.SIGCONT)
    assert "answers again" in first.stderr.readline()
    assert end(second)[0] == 0 and end(first)[0] == 0


def test_a_collective_that_times_out_says_where_everybody_stands(start):
    first, second = start(0, "collective", 0.02), start(1)
    code, said = end(first)
    assert code == 76 and "nothing moved for" in said and "(--timeout-minutes 0.02)" in said
    assert "rank 1 at step 2, optimizer step" in said
    assert "Traceback" not in said and second.poll() is None


def test_an_orderly_end_is_no_death(start):
    first, second = start(0), start(1)
    assert end(second) == (0, "")
    time.sleep(0.5)
    assert end(first) == (0, "")


def test_strangers_are_not_listened_to(server):
    stranger = socket.create_connection(("127.0.0.1", server.port))
    stranger.sendall(encode({"token": "wrong", "rank": 0, "host": "x", "pid": 1}))
    stranger.settimeout(20)
    assert stranger.recv(100) == b""
    garbage = socket.create_connection(("127.0.0.1", server.port))
    garbage.settimeout(20)
    garbage.sendall(b"\x00\xff\n")
    assert garbage.recv(100) == b""
    friend = Watchdog(0, "n0")
    friend.connect("127.0.0.1", server.port, "secret")
    friend.close()


def test_ranks_are_written_short():
    assert describe_ranks([5, 0, 1, 2]) == "0-2, 5"
    assert describe_ranks([]) == ""
