"""The record of a run: metrics.jsonl, events.jsonl, alarms, TensorBoard, Weights & Biases, and the progress display.

Rank 0 has a `RunRecord`, every other rank a `NullRecord`, so the loop asks no rank.
"""

import contextlib
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard.writer import SummaryWriter

from minimind.training.record.alarms import AlarmWatch
from minimind.training.record.event_files import put_in_the_past
from minimind.training.record.events import write_event
from minimind.training.record.progress import Progress
from minimind.training.record.run_files import (
    METRICS_NAME,
    MOST_LOADS,
    STEPS_BETWEEN_LOADS,
    EvaluationRecord,
    Record,
    StepRecord,
    append_object,
    figures_by_source,
    finite,
    keep_until,
    read_records,
)
from minimind.training.record.wandb import WandbLog

_HISTORY_BYTES = 4 << 20
"""Some 10,000 steps of a dense model."""

_TENSORBOARD_NAMES = {
    "loss": "train/loss",
    "aux_loss": "train/aux_loss",
    "load_entropy": "experts/load_entropy",
    "dropped_share": "experts/dropped_share",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "loss_scale": "train/loss_scale",
    **{name: f"preference/{name}" for name in ("reward_accuracy", "reward_margin", "chosen_log_prob", "kl")},
    "rejected_log_prob": "preference/rejected_log_prob",
    "eval_reward_accuracy": "eval/reward_accuracy",
    "teacher_kl": "distillation/kl",
    "teacher_agreement": "distillation/agreement",
    "eval_teacher_kl": "eval/teacher_kl",
    **{name: f"reward/{name}" for name in ("reward", "reward_std", "no_signal", "answer_length", "cut_share")},
    **{name: f"reward/{name}" for name in ("ratio", "log_prob_gap", "clip_fraction")},
    "eval_reward": "eval/reward",
    "eval_answer_length": "eval/answer_length",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "step_seconds": "speed/step_seconds",
    "peak_memory_bytes": "memory/peak_bytes",
    "eval_loss": "eval/loss",
    "eval_perplexity": "eval/perplexity",
    "eval_bits_per_byte": "eval/bits_per_byte",
}


class NullRecord:
    """The record on a rank that writes none."""

    def _do_nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    log_step = log_evaluation = log_event = log = flush = close = _do_nothing


class RunRecord(NullRecord):
    """The record of a run in its folder.

    Args:
        start_step: steps already taken. Lines beyond it (a run that went on after its last checkpoint) are dropped,
            because those steps are about to be repeated.
        total_steps: for the progress display.
        peak_tokens_per_second: with every device at its peak FLOP/s, the denominator of MFU; None: no MFU.
        hosts: name of the host of each rank, for alarms.
        wandb: gets every record as well.
    """

    def __init__(
        self,
        run_dir: Path,
        start_step: int,
        total_steps: int,
        *,
        peak_tokens_per_second: float | None = None,
        tensorboard: bool = True,
        hosts: Sequence[str] = (),
        wandb: WandbLog | None = None,
    ) -> None:
        self._run_dir, self._path = run_dir, run_dir / METRICS_NAME
        run_dir.mkdir(parents=True, exist_ok=True)
        last = keep_until(self._path, start_step)
        self._tensorboard = None
        if tensorboard:
            put_in_the_past(run_dir / "tensorboard", time.time())
            self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1, flush_secs=30)
        self._wandb = wandb
        self._peak = peak_tokens_per_second
        self._progress = Progress(start_step, total_steps)
        if last > start_step:
            self.log(f"{METRICS_NAME}: dropped what is beyond step {start_step} (to step {last}): trained again")
        self._alarms = AlarmWatch(hosts=hosts)
        for record in read_records(self._path, _HISTORY_BYTES):  # a resumed run is judged by its earlier steps too
            self._alarms.observe(record)

    def log_step(self, record: StepRecord) -> None:
        """Write the record of one optimizer step, with its MFU."""
        speed = record.get("tokens_per_second")
        record["mfu"] = speed / self._peak if speed is not None and self._peak else None
        self._progress.show(record)
        self._write(record)

    def log_evaluation(self, record: EvaluationRecord) -> None:
        """Write the record of an evaluation, and show it."""
        words = [f"step {record['step']}", f"eval loss {record['eval_loss']:.4f}"]
        if (bits := record["eval_bits_per_byte"]) is not None and math.isfinite(bits):
            words.append(f"bits/byte {bits:.4f}")
        if "eval_reward_accuracy" in record:
            words.append(f"reward accuracy {record['eval_reward_accuracy']:.1%}")
        elif "eval_reward" in record:
            words.append(f"reward {record['eval_reward']:.4f}")
        elif "eval_teacher_kl" in record:
            words.append(f"teacher KL {record['eval_teacher_kl']:.4f}")
        else:  # of no other loss is it one
            words.append(f"perplexity {record['eval_perplexity']:.2f}")
        words += [f"{name} {loss:.4f}" for name, loss in record.get("eval_source_loss", {}).items()]
        self.log("  ".join(words))
        self._write(record)

    def log_event(self, event: str, step: int, message: str) -> None:
        """Append to events.jsonl."""
        write_event(self._run_dir, event, step, message)

    def log(self, message: str) -> None:
        """Print a line without tearing the progress bar."""
        self._progress.log(message)

    def flush(self) -> None:
        """Bring everything written so far to the disk."""
        if self._path.exists():
            with open(self._path, "rb") as file:
                os.fsync(file.fileno())
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        """Close what is open; a second call does nothing."""
        for part in (self._tensorboard, self._wandb, self._progress):
            if part is not None:
                # A full disk was reported when it was met, and must not hide the error under way.
                with contextlib.suppress(OSError):
                    part.close()

    def _write(self, record: Record) -> None:
        line = {key: _jsonable(value) for key, value in record.items()}
        if sum(map(len, line.get("expert_load", ()))) > MOST_LOADS and record["step"] % STEPS_BETWEEN_LOADS:
            line = {key: value for key, value in line.items() if not key.startswith("expert_")}
        append_object(self._path, line)
        if self._wandb is not None:
            self._wandb.log(record)
        if self._tensorboard is not None:
            self._to_tensorboard(self._tensorboard, record)
        for alarm in self._alarms.observe(finite(record)):
            self.log(f"alarm: step {alarm.step}: {alarm.message}")
            write_event(self._run_dir, "alarm", alarm.step, alarm.message, alarm.kind)

    def _to_tensorboard(self, writer: SummaryWriter, record: Record) -> None:
        step, values = record["step"], dict[str, Any](record)
        for key, name in _TENSORBOARD_NAMES.items():
            if isinstance(value := values.get(key), (int, float)):
                writer.add_scalar(name, value, step)
        for name, value in figures_by_source(record).items():
            writer.add_scalar(name, value, step)
        if "data_seconds" in values:  # a reading of the device: a histogram of every step would be many
            for layer, load in enumerate(values.get("expert_load", ())):
                writer.add_histogram(f"experts/load_{layer}", np.array(load), step)


def _jsonable(value: Any) -> Any:
    """JSON has no NaN and no infinity: written as strings, no reader takes them for numbers."""
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
