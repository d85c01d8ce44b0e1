"""What a run says while it goes: metrics.jsonl, TensorBoard, and a progress bar or plain lines.

Rank 0 alone writes. Every optimizer step stands once in metrics.jsonl, also after a resume. Knows nothing of the model
or of DeepSpeed: values come in as numbers.
"""

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.utils.tensorboard.writer import SummaryWriter

from minimind.errors import UserError
from minimind.training.record.alarms import AlarmWatch
from minimind.training.record.events import EventLog
from minimind.training.record.progress import Progress
from minimind.training.record.run_files import METRICS_NAME, keep_until, read_records
from minimind.training.record.wandb import WandbLog

_NAME = re.compile(r"events\.out\.tfevents\.(\d{10})\.(.+)")

_TENSORBOARD_NAMES = {
    "loss": "train/loss",
    "aux_loss": "train/aux_loss",
    "load_entropy": "experts/load_entropy",
    "dropped_share": "experts/dropped_share",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "loss_scale": "train/loss_scale",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "step_seconds": "speed/step_seconds",
    "peak_memory_bytes": "memory/peak_bytes",
    "eval_loss": "eval/loss",
    "eval_perplexity": "eval/perplexity",
    "eval_bits_per_byte": "eval/bits_per_byte",
}


class MetricsLog:
    """The record of a run in its folder; opened on rank 0 only.

    Args:
        run_dir: the run's folder.
        start_step: steps already taken; what the files hold beyond them (a run that went on after its last checkpoint)
            is taken out, because those steps are about to happen again.
        total_steps: for the progress display.
        hosts: name of the host of each rank, for alarms.
        wandb: takes every record, too.
    """

    def __init__(
        self,
        run_dir: Path,
        start_step: int,
        total_steps: int,
        *,
        tensorboard: bool = True,
        hosts: Sequence[str] = (),
        wandb: WandbLog | None = None,
    ) -> None:
        self._path = run_dir / METRICS_NAME
        run_dir.mkdir(parents=True, exist_ok=True)
        keep_until(self._path, start_step)
        self._file: TextIO = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (open for the life of the run)
        put_in_the_past(run_dir / "tensorboard", time.time())
        self._tensorboard = (
            SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1, flush_secs=30)
            if tensorboard
            else None
        )
        self._progress = Progress(start_step, total_steps)
        self._events = EventLog(run_dir)
        self._wandb = wandb
        self._alarms = AlarmWatch(hosts=hosts)
        for record in read_records(self._path):  # a resumed run is judged by what came before, too
            self._alarms.observe(record)

    def log_step(self, record: Mapping[str, Any]) -> None:
        """Write the record of one optimizer step; `record["step"]` counts from 1."""
        self._write(record)
        self._progress.show(record)
        self._raise_alarms(record)

    def log_evaluation(self, record: Mapping[str, Any]) -> None:
        """Write the record of an evaluation after `record["step"]` steps, and show it."""
        self._write(record)
        self._progress.say(
            f"step {record['step']}  eval loss {record['eval_loss']:.4f}  "
            f"bits/byte {record['eval_bits_per_byte']:.4f}  perplexity {record['eval_perplexity']:.2f}"
        )
        self._raise_alarms(record)

    def log_event(self, event: str, step: int, message: str) -> None:
        """Write what happened after `step` steps into events.jsonl."""
        self._events.write(event, step, message)

    def _raise_alarms(self, record: Mapping[str, Any]) -> None:
        for alarm in self._alarms.observe(record):
            self._progress.say(f"alarm: step {alarm.step}: {alarm.message}")
            self._events.write("alarm", alarm.step, alarm.message, alarm.kind)

    def log_histogram(self, name: str, values: torch.Tensor, step: int) -> None:
        """Add a histogram to TensorBoard, where it is on."""
        if self._tensorboard is not None:
            self._tensorboard.add_histogram(name, values, step)

    def say(self, message: str) -> None:
        """Print a line without tearing the progress bar."""
        self._progress.say(message)

    def flush(self) -> None:
        """Bring everything written so far to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        """Flush and close; the object is of no use afterwards."""
        # Closed already, or a full disk: that was said when it was met, and must not hide the error under way.
        with contextlib.suppress(ValueError, OSError):
            self.flush()
        with contextlib.suppress(OSError):
            self._file.close()
        if self._tensorboard is not None:
            with contextlib.suppress(OSError):
                self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._progress.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps({key: _finite(value) for key, value in record.items()}) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self._path}: {error.strerror or error}; free disk space and resume the run") from None
        if self._wandb is not None:
            self._wandb.log(record)
        if self._tensorboard is not None:
            for key, name in _TENSORBOARD_NAMES.items():
                value = record.get(key)
                if isinstance(value, (int, float)):
                    self._tensorboard.add_scalar(name, value, record["step"])


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are written as strings, so that no reader takes them for numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def put_in_the_past(folder: Path, now: float) -> None:
    """Rename the event files in `folder` that a file made `now` would not come after; their order stays."""
    found = sorted(path for path in folder.glob("events.out.tfevents.*") if _NAME.fullmatch(path.name))
    latest = int(now) - 1
    for path in reversed(found):
        match = _NAME.fullmatch(path.name)
        assert match is not None
        if int(match[1]) > latest:
            os.replace(path, path.with_name(f"events.out.tfevents.{latest:010d}.{match[2]}"))
        latest = min(latest, int(match[1])) - 1
