"""Tiny runs for the tests of checkpoints: in this process (one rank), or on ranks that wait for work in their own."""

import contextlib
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import sys
import traceback
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from repository import ROOT

from minimind.distributed.launchers.local import find_free_port

# Threads that wait for each other on busy cores make a tiny model a hundred times slower. Ranks inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

MODEL = {
    "vocab_size": 256,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}

# Beside MODEL: two layers of experts, with a selection bias, which is a buffer. The weights start large: where the best
# experts of a token are equal but for rounding, another order of sums takes another.
EXPERTS = {
    "use_moe": True,
    "num_hidden_layers": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "router_aux_loss_coef": 0.01,
    "router_bias_update_rate": 0.001,
    "initializer_range": 0.1,
}
# The same under deepspeed.moe, whose router has no selection bias.
NATIVE = {**EXPERTS, "router_bias_update_rate": 0.0, "moe_backend": "deepspeed"}


def flags_for(corpus: Path, run_dir: Path, *, stage: int = 1, precision: str = "fp32", **others: Any) -> list[str]:
    """A command line of `minimind.train`: 4 samples of 16 tokens a step, a checkpoint every second step."""
    settings = {
        **MODEL,
        "shards": corpus,
        "run_dir": run_dir,
        "ds_config": ROOT / "ds_configs" / f"zero{stage}.json",
        "precision": precision,
        "seq_len": 16,
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "steps": 6,
        "warmup_steps": 2,
        "save_every": 2,
        "num_workers": 0,
        "tensorboard": False,
        **others,
    }
    if not names_optimizer(Path(settings["ds_config"])):
        settings.setdefault("optimizer", "adamw")
    flags: list[str] = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            flags += [flag, *map(str, value if isinstance(value, tuple) else [value])]
    return flags


def names_optimizer(ds_config: Path) -> bool:
    """Whether a DeepSpeed JSON, if it is one, says which optimizer it is."""
    try:
        return json.loads(ds_config.read_text()).get("optimizer", {}).get("type", "auto") != "auto"
    except (OSError, ValueError):
        return False


def train(flags: list[str], output: TextIO | None = None) -> tuple[int, str]:
    """Run one rank here; its exit code and what it printed (or nothing, with an `output` that takes it). A `UserError`
    passes through."""
    import torch

    from minimind.train import main

    printed = io.StringIO()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # What the device could do is measured in every run; here it would take longer than the run.
        with (
            contextlib.redirect_stdout(output or printed),
            unittest.mock.patch("minimind.training.setup.peak_flops") as peak_flops,
        ):
            peak_flops.return_value = (1e12, "not measured")
            code = main(flags)
    finally:
        torch.set_num_threads(threads)
    return code, printed.getvalue()


def train_rank(flags: list[str], rank: int, world_size: int, port: int, printed: Path, work: Callable = train) -> None:
    """One rank, in its own process; its output goes into a file."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    with open(printed, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from minimind.errors import run_main

    run_main(lambda: work(flags, sys.stdout)[0])


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Every record of a run."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> dict[int, float]:
    """Loss of every step; fails where a step stands twice."""
    found = [(record["step"], record["loss"]) for record in read_metrics(run_dir) if "loss" in record]
    assert len(found) == len(dict(found)), "a step stands twice"
    return dict(found)


def weights(run_dir: Path) -> dict[str, Any]:
    """The float32 weights of the newest checkpoint."""
    from minimind.checkpoints.consolidate import TrainingCheckpoint
    from minimind.checkpoints.folder import list_checkpoints

    return {name: tensor.clone() for name, tensor in TrainingCheckpoint(list_checkpoints(run_dir)[-1]).state_dict()}


SECONDS_TO_WAIT = 300
PRELOAD = ["minimind.train"]


class RankPool:
    """Processes that have imported everything and run functions together as the ranks of one world.

    DeepSpeed keeps state of its first world in a process, so a pool has one size for its life.
    """

    def __init__(self, world_size: int) -> None:
        # The server imports once, and each rank is a fork of it.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._pipes = []
        self._processes = []
        for _ in range(world_size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(*args)` on every rank; their results, or the error that the first raised."""
        self.start(function, *args)
        results = self.finish()
        for kind, value in results:
            if kind == "error":
                raise value if isinstance(value, Exception) else RuntimeError(value)
        return [value for _, value in results]

    @property
    def pids(self) -> list[int]:
        """Process numbers of the ranks."""
        return [process.pid or 0 for process in self._processes]

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        """Let every rank begin `function(*args)`."""
        port = find_free_port()
        for rank, pipe in enumerate(self._pipes):
            pipe.send((function, args, rank, len(self._pipes), port))

    def finish(self) -> list[tuple[str, Any]]:
        """What the ranks did: ("done", result) or ("error", an exception or a traceback)."""
        results: dict[Any, tuple[str, Any]] = {}
        seconds = SECONDS_TO_WAIT
        while len(results) < len(self._pipes):
            waiting = [pipe for pipe in self._pipes if pipe not in results]
            ready = multiprocessing.connection.wait(waiting, seconds)
            results |= {pipe: pipe.recv() for pipe in ready}
            failed = [value for kind, value in results.values() if kind == "error"]
            if not ready:
                for process in self._processes:
                    process.kill()
                raise RuntimeError(f"ranks hang; what others said: {failed}")
            if failed:
                seconds = 15  # a rank that failed alone leaves the others waiting for it
        return [results[pipe] for pipe in self._pipes]

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            with contextlib.suppress(OSError):
                pipe.send(None)
            process.join(10)
            process.kill()


def _serve(pipe: Any) -> None:
    from minimind.errors import UserError

    while (work := pipe.recv()) is not None:
        function, args, rank, size, port = work
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        try:
            pipe.send(("done", function(*args)))
        except UserError as error:
            pipe.send(("error", UserError(str(error))))
        except BaseException:
            pipe.send(("error", traceback.format_exc()))


def rank_pool(world_size: int) -> Iterator[RankPool]:
    """For a fixture: a pool that is closed at the end."""
    pool = RankPool(world_size)
    yield pool
    pool.close()
