"""Ranks on a machine of simulated GPUs: processes that have imported everything and do one thing after another."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from repository import ROOT
from simulated_device import Machine, environment
from training_runs import RankPool


def gpu_environment(world_size: int, machine: Machine | None = None) -> dict[str, str]:
    """The variables of a process on simulated GPUs, or on the real ones where this process is shown any; on the CPU for
    a machine without devices."""
    if machine is not None and not machine.devices:
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    elif machine is None and torch.cuda.is_available():
        env = dict(os.environ)
    else:
        env = environment(machine or Machine(devices=world_size))
    # What is sent by name is imported there, and imports the project.
    paths = [str(Path(__file__).parent), str(ROOT), env.get("PYTHONPATH", "")]
    return {**env, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


class SimulatedRanks:
    """`RankPool` with `gpu_environment`. A process of its own stands between, as all pools of a process fork from one
    server with one environment. Functions are sent by name, so they lie in a module of tests/support."""

    def __init__(self, world_size: int, machine: Machine | None = None) -> None:
        command, env = [sys.executable, __file__, str(world_size)], gpu_environment(world_size, machine)
        self._process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(*args)` on every rank; their results, or the error that the first raised."""
        assert self._process.stdin is not None and self._process.stdout is not None
        pickle.dump((function, args), self._process.stdin)
        self._process.stdin.flush()
        kind, value = pickle.load(self._process.stdout)
        if kind == "error":
            raise value
        return value

    def close(self) -> None:
        """End the ranks."""
        self._process.communicate()


def simulated_ranks(world_size: int, machine: Machine | None = None) -> Iterator[SimulatedRanks]:
    """For a fixture: ranks that end with it."""
    ranks = SimulatedRanks(world_size, machine)
    yield ranks
    ranks.close()


def serve(world_size: int) -> None:
    """Answer requests until standard input ends."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the ranks print is no answer
    pool = RankPool(world_size)
    while True:
        try:
            function, args = pickle.load(requests)
        except EOFError:
            break
        try:
            answer: tuple[str, Any] = ("done", pool.run(function, *args))
        except Exception as error:
            answer = ("error", error)
        pickle.dump(answer, answers)
        answers.flush()
    pool.close()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
