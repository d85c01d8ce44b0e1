"""A training run in a process of its own, for commands that try one and read what it has recorded."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from minimind.config.run_config import RunConfig
from minimind.distributed.launchers import local
from minimind.training.record.run_files import METRICS_NAME, Record, read_records

SECONDS_BETWEEN_LOOKS = 0.2
_OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC_", "SLURM_", "OMPI_", "PMI")


class ChildRun(NamedTuple):
    """What a run has left."""

    code: int | None
    """Its exit code; None: it was ended here."""
    said: str
    """On standard error."""
    records: list[Record]

    def error(self) -> str:
        """Why it failed, in one line."""
        if self.code is not None and self.code < 0:
            return f"ended by {signal.Signals(-self.code).name}"
        lines = [line for line in self.said.splitlines() if line.strip()] or ["nothing was said"]
        raised = [line for line in lines if re.match(r"error: |[\w.]*(Error|Exception)\b", line)]
        return (raised or lines)[-1].removeprefix("error: ")


def train_in_child(
    run: RunConfig,
    folder: Path,
    *,
    ranks: int = 1,
    variables: Mapping[str, str] | None = None,
    seconds: float | None = None,
    is_enough: Callable[[list[Record]], bool] | None = None,
) -> ChildRun:
    """Train as `run` says, by `minimind.train`, and wait for the end.

    Args:
        run: its `run_dir` is the one that is read.
        folder: for the files of this call.
        variables: of its environment, beside those of this process.
        seconds: end it after so long.
        is_enough: end it as soon as this is true of its records.
    """
    (folder / "config.json").write_text(json.dumps(run.to_dict()))
    launcher = ["-m", local.__name__, str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "minimind.train", "--config", str(folder / "config.json")]
    # This process may be a rank itself.
    env = {name: value for name, value in os.environ.items() if not name.startswith(_OF_A_LAUNCHER)}
    metrics, began = Path(run.train.run_dir) / METRICS_NAME, time.monotonic()
    with open(folder / "said", "w") as said:
        child = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=said, env=env | dict(variables or {}),
            preexec_fn=local.end_with_parent(),
        )  # fmt: skip
        try:
            while (code := child.poll()) is None and (seconds is None or time.monotonic() - began < seconds):
                if is_enough is not None and is_enough(read_records(metrics)):
                    break
                time.sleep(SECONDS_BETWEEN_LOOKS)
        finally:
            child.kill()
            child.wait()
    return ChildRun(code, (folder / "said").read_text(errors="replace"), read_records(metrics))
