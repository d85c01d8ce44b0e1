"""launch/pretrain.sbatch on a real SLURM with two nodes: trains, is requeued and continues, loses a node, loses a rank.

All runs but the killed one are 150 steps long, with a checkpoint after each, and have to give the losses of the run
that nobody interrupted, bit for bit.
"""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from repository import ROOT
from services import BIN, Slurm, are_gone, ranks_of, wait_for_steps, wait_until
from training_runs import flags_for, losses, read_metrics

pytestmark = pytest.mark.cluster

STEPS = 150


def flags(corpus: Path, run_dir: Path, **others) -> list[str]:
    return flags_for(
        corpus, run_dir, **{"steps": STEPS, "save_every": 1, "keep_last": 2, "schedule": "constant", **others}
    )


def is_pending(pid: int, number: int) -> bool:
    """Whether a signal waits for a process, which may be stopped."""
    masks = re.findall(r"^(?:SigPnd|ShdPnd):\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


def start_now(slurm: Slurm, job: str) -> None:
    """SLURM lets a requeued job wait; this one need not."""
    slurm.wait_for(job, ["PENDING", "RUNNING"])
    slurm.run("scontrol", "update", f"jobid={job}", "StartTime=now")


def test_the_time_limit_requeues_the_job_which_continues_bit_for_bit(slurm, tiny_corpus, tmp_path, reference):
    """The ranks are held still until SLURM has signalled, so that the test does not depend on how fast they are."""
    run_dir, output = tmp_path / "run", tmp_path / "job.log"
    job = slurm.submit(["--time=1", "--signal=B:USR1@40"], flags(tiny_corpus, run_dir), output)
    wait_for_steps(run_dir, 5, output)
    ranks = ranks_of(run_dir)
    assert sorted(ranks) == [0, 1]
    for pid in ranks.values():
        os.kill(pid, signal.SIGSTOP)
    stopped_at = len(read_metrics(run_dir))
    assert stopped_at < STEPS - 10
    wait_until(lambda: all(is_pending(pid, signal.SIGUSR1) for pid in ranks.values()), 90, output.read_text)
    for pid in ranks.values():
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: slurm.job(job)["Restarts"] == "1", 60, output.read_text)
    assert are_gone(list(ranks.values()))
    start_now(slurm, job)
    slurm.run("scontrol", "update", f"jobid={job}", "TimeLimit=10")
    assert slurm.wait_for(job, ["COMPLETED", "FAILED", "TIMEOUT"])["ExitCode"] == "0:0", output.read_text()
    text = output.read_text()
    assert "exit code 75 after SIGUSR1; queued again, restart 1 of at most 20" in text
    resumed = int(re.findall(r"resumed from .* at step (\d+)", text)[0])
    assert stopped_at <= resumed < STEPS
    assert losses(run_dir) == reference


def test_a_node_that_goes_down_costs_no_more_than_a_step(slurm, tiny_corpus, tmp_path, reference):
    run_dir, output = tmp_path / "run", tmp_path / "job.log"
    job = slurm.submit([], flags(tiny_corpus, run_dir), output)
    wait_for_steps(run_dir, 5, output)
    assert re.search(r"^n1 .*\n^n2 ", output.read_text(), re.M), "the preflight's table does not show both nodes"
    slurm.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    wait_until(lambda: slurm.job(job)["Restarts"] == "1", 60, output.read_text)
    reached = len(read_metrics(run_dir))
    start_now(slurm, job)
    assert slurm.wait_for(job, ["COMPLETED", "FAILED"])["ExitCode"] == "0:0", output.read_text()
    resumed = int(re.findall(r"resumed from .* at step (\d+)", output.read_text())[0])
    assert resumed >= reached - 2, "more was lost than the steps since the last checkpoint"
    assert losses(run_dir) == reference


def test_a_killed_rank_is_named_and_ends_the_job_within_a_minute(slurm, tiny_corpus, tmp_path):
    run_dir, output = tmp_path / "run", tmp_path / "job.log"
    job = slurm.submit([], flags(tiny_corpus, run_dir, steps=100_000), output, MAX_RESTARTS="0")
    wait_for_steps(run_dir, 3, output)
    ranks = ranks_of(run_dir)
    os.kill(ranks[1], signal.SIGKILL)
    began = time.monotonic()
    wait_until(lambda: are_gone(list(ranks.values())), 60, output.read_text)
    found = slurm.wait_for(job, ["FAILED", "COMPLETED"], 60)
    assert time.monotonic() - began < 60
    assert (found["JobState"], found["ExitCode"]) == ("FAILED", "137:0")
    text = output.read_text()
    assert f"rank 0 on n1: error: rank 1 on n2 (process {ranks[1]}) died" in text and "it was at " in text, text
    assert "not queued again: MAX_RESTARTS allows 0 restarts" in text and "Traceback" not in text


def test_a_cancelled_job_saves_and_stays_cancelled(slurm, tiny_corpus, tmp_path):
    """Its ranks run in a container, whose command only takes away its own flags here."""
    run_dir, output, stub = tmp_path / "run", tmp_path / "job.log", tmp_path / "apptainer"
    stub.write_text(
        f'#!/bin/bash\necho "$@" >> {tmp_path}/asked\nwhile [[ "$1" != *.sif ]]; do shift; done\nexec "${{@:2}}"'
    )
    stub.chmod(0o755)
    inside = {"CONTAINER": "minimind.sif", "PATH": f"{tmp_path}:{BIN}:{slurm.environment['PATH']}"}
    job = slurm.submit([], flags(tiny_corpus, run_dir, steps=100_000, save_every=0), output, **inside)
    wait_for_steps(run_dir, 3, output)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == 2 and all(f"--bind {ROOT}:{ROOT} " in line and " python3 " in line for line in asked)
    slurm.run("scancel", job)
    found = slurm.wait_for(job, ["CANCELLED", "PENDING", "FAILED", "COMPLETED"])
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0"), output.read_text()
    assert [path.name for path in (run_dir / "checkpoints").glob("step_*")], "nothing was saved"
