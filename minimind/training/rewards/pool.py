"""Rewards in processes of their own, with a time limit: what hangs, dies or raises there does not end the training."""

import contextlib
import json
import math
import multiprocessing.connection
import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from minimind.config.run_config import TrainConfig
from minimind.errors import UserError
from minimind.training.rewards.ready import Answer

_SECONDS_TO_START = 600.0
"""A module may import whole frameworks, on a machine that is busy."""


class Score(NamedTuple):
    """What an answer has earned of each reward, or why that is not known."""

    values: tuple[float, ...]
    error: str = ""


class RewardPool:
    """Rewards and environment of a run, in `reward_workers` processes that are started when they are needed."""

    def __init__(self, train: TrainConfig) -> None:
        self._names = train.reward
        num_workers = train.reward_workers
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="rewards")
        self._workers: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(num_workers):
            self._workers.put(_Worker(train))

    def score(self, answers: Sequence[Answer]) -> list[Score]:
        """The rewards of each answer, in order."""
        return [self._read_score(reply) for reply in self._threads.map(self._ask, [one._asdict() for one in answers])]

    def observe(self, conversations: Sequence[tuple[str, list[str]]]) -> list[dict[str, str | None]]:
        """What the environment says to the last of the model's texts after a prompt: the `observation`, or an
        `error`."""
        requests = [{"prompt": prompt, "texts": texts} for prompt, texts in conversations]
        return list(self._threads.map(self._ask, requests))

    def close(self) -> None:
        """End the processes."""
        self._threads.shutdown()
        while not self._workers.empty():
            self._workers.get().close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        worker = self._workers.get()
        try:
            return worker.ask(request)
        except UserError as error:
            return {"error": str(error)}
        finally:
            self._workers.put(worker)

    def _read_score(self, reply: dict[str, Any]) -> Score:
        if "error" in reply:
            return Score((), reply["error"])
        for name, value in zip(self._names, reply["values"], strict=True):
            if not math.isfinite(value):
                return Score((), f"{name} gave {value}")
        return Score(tuple(reply["values"]))


def check_rewards(train: TrainConfig) -> None:
    """Refuse rewards that are missing, not wanted or cannot be imported, before a run starts. Raises `UserError`."""
    names, weights = train.reward, train.reward_weights
    if (train.objective == "grpo") != bool(names):
        raise UserError(f"reward: {' '.join(names) or 'none'}; --objective grpo and --reward NAME are given together")
    if weights and len(weights) != len(names):
        raise UserError(f"reward_weights: {len(weights)} weights for {len(names)} rewards; give one for each")
    if train.kl_coef and train.init_from is None:
        raise UserError(f"kl_coef: {train.kl_coef:g} is the divergence from a trained model; give it by --init-from")
    if train.environment is not None and train.objective != "grpo":
        raise UserError(f"environment: {train.environment} has no effect without --objective grpo; leave it out")
    if names:
        worker = _Worker(train)
        worker.start()
        worker.close()


class _Worker:
    """One process, started when it is needed and again after it was killed."""

    def __init__(self, train: TrainConfig) -> None:
        self._seconds = train.reward_seconds
        self._names = [*train.reward]
        if train.environment is not None:
            self._names += ["--environment", train.environment]
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the process replies, or an `error`."""
        process = self._process or self.start()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: said below
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        return self._read(self._seconds)

    def start(self) -> "subprocess.Popen[bytes]":
        """Start the process. Raises `UserError` when it cannot import a function."""
        # Modules are found as this process finds them; the device is the training's.
        path = os.pathsep.join(place or os.getcwd() for place in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "minimind.training.rewards.worker", *self._names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        )
        if error := self._read(_SECONDS_TO_START).get("error"):
            self.close()
            raise UserError(f"reward: {error}; give module:name, or one of minimind.training.rewards")
        return self._process

    def close(self) -> None:
        """End the process, whatever it does."""
        if (process := self._process) is not None:
            self._process = None
            process.kill()
            process.communicate()

    def _read(self, seconds: float) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdout is not None
        line = b""
        if multiprocessing.connection.wait([process.stdout.fileno()], seconds):
            line = process.stdout.readline()
        elif process.poll() is None:
            self.close()
            return {"error": f"{', '.join(self._names)} took longer than {seconds:g} s"}
        if not line:
            self.close()
            return {"error": f"{', '.join(self._names)}: the process ended with code {process.returncode}"}
        return json.loads(line)
