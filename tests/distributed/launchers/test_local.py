"""The ranks of one machine: their environment, their exit codes, and that none outlives another or its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from repository import ROOT


def start(script: Path, ranks: int = 2) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "minimind.distributed.launchers.local", str(ranks), str(script)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def write_script(folder: Path, body: str) -> Path:
    """The program of every rank. They share one pipe: a line is written in one piece, as `print` would not."""
    path = folder / "rank.py"
    path.write_text("import os, signal, sys, time\nrank = int(os.environ['RANK'])\n" + body)
    return path


def wait_until_gone(pids: list[int]) -> None:
    for _ in range(200):
        alive = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        if not alive:
            return
        time.sleep(0.05)
    raise AssertionError(f"still running: {alive}")


def test_ranks_know_who_they_are_and_share_a_port(tmp_path):
    names = "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"
    body = f"open(f'{tmp_path}/said-{{rank}}', 'w').write(' '.join([str(rank), *map(os.environ.get, {names})]))\n"
    process = start(write_script(tmp_path, body), ranks=3)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    rows = [(tmp_path / f"said-{rank}").read_text().split() for rank in range(3)]
    assert [row[:3] for row in rows] == [["0", "3", "0"], ["1", "3", "1"], ["2", "3", "2"]]
    assert len({row[3] for row in rows}) == 1


@pytest.mark.parametrize(
    ("body", "code"),
    [("sys.exit(2)\n", 2), ("os.kill(os.getpid(), signal.SIGKILL)\n", 128 + signal.SIGKILL)],
)
def test_the_exit_code_is_the_first_failing_rank_s(tmp_path, body, code):
    process = start(write_script(tmp_path, f"if rank == 1:\n    {body}"))
    process.communicate(timeout=60)
    assert process.returncode == code


def test_a_failed_rank_ends_the_others(tmp_path):
    body = "os.write(1, b'%d\\n' % os.getpid())\nif rank == 0:\n    sys.exit(3)\ntime.sleep(300)\n"
    process = start(write_script(tmp_path, body))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 3
    wait_until_gone([int(line) for line in output.split()])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_rank_outlives_its_parent(tmp_path, number):
    process = start(write_script(tmp_path, "os.write(1, b'%d\\n' % os.getpid())\ntime.sleep(300)\n"))
    assert process.stdout is not None
    pids = [int(process.stdout.readline()) for _ in range(2)]
    process.send_signal(number)
    process.wait(timeout=60)
    assert process.returncode != 0
    wait_until_gone(pids)
    process.stdout.close()
