"""The files of a run folder, and metrics.jsonl: the fields of its lines and their one reader. Needs no torch."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypedDict, cast

from minimind.files import fsync_folder, temporary_name

METRICS_NAME = "metrics.jsonl"
RUN_CONFIG_NAME = "run_config.json"
DS_CONFIG_NAME = "ds_config.json"


class ExpertBalance(TypedDict):
    """A value for each layer of experts."""

    min: list[int]  # tokens of the idlest expert
    max: list[int]  # and of the busiest
    entropy: list[float]  # of the load, over its maximum: 1 is even, 0 is one expert for all
    dropped: list[float]  # share of the choices that found no room


class _AtStep(TypedDict):
    step: int  # optimizer steps taken, from 1


class StepRecord(_AtStep, total=False):
    """One optimizer step. In the file NaN and infinity are strings, as JSON has neither; read back they are None."""

    loss: float | None  # mean over the targets of all ranks and micro-batches, in nats
    lr: float | None
    grad_norm: float | None  # global 2-norm before clipping
    tokens_seen: int
    consumed_samples: int
    step_seconds: float | None  # mean over the steps since the last reading of the device (`log_every`)
    tokens_per_second: float | None  # of all ranks
    mfu: float | None  # share of the peak FLOP/s of all devices; None: peak unknown
    peak_memory_bytes: int  # of rank 0: device memory on CUDA, resident memory on CPU
    loss_scale: float | None  # fp16 only
    # On steps that read the device. A rank's own time is its wait for data and its forward passes.
    data_seconds: float | None  # longest wait for data of any rank
    slowest_rank: int  # several ranks only, and so the next two
    slowest_rank_seconds: float
    median_rank_seconds: float  # of the other ranks
    # Models with experts only.
    aux_loss: float | None  # summed over the layers, coefficients included
    expert_load: list[list[int]]  # tokens that chose each expert, a row for each layer of experts
    expert_balance: ExpertBalance
    load_entropy: float | None  # mean over the layers
    dropped_share: float | None  # mean over the layers


class EvaluationRecord(_AtStep, total=False):
    """One evaluation."""

    eval_loss: float | None  # nats a token
    eval_bits_per_byte: float | None
    eval_perplexity: float | None
    eval_targets: int  # tokens predicted


Record = StepRecord | EvaluationRecord


def finite(record: Record) -> Any:
    """The record with None for every figure that is not finite, or was a string in the file."""
    return {
        key: None if isinstance(value, str) or (isinstance(value, float) and not math.isfinite(value)) else value
        for key, value in record.items()
    }


def read_records(path: Path, tail_bytes: int | None = None) -> list[Record]:
    """The records of a metrics.jsonl, which may be growing: a line cut short is skipped. No file: no records.

    Args:
        tail_bytes: read no more than so much of the end.
    """
    if not path.exists():
        return []
    with open(path, "rb") as file:
        if tail_bytes is not None and path.stat().st_size > tail_bytes:
            file.seek(-tail_bytes, os.SEEK_END)
            file.readline()  # the rest of a line
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    return [finite(record) for line in lines if (record := _parse(line)) is not None]


def steps_of(records: Iterable[Record]) -> list[StepRecord]:
    """The records of optimizer steps."""
    return [cast(StepRecord, record) for record in records if "loss" in record]


def evaluations_of(records: Iterable[Record]) -> list[EvaluationRecord]:
    """The records of evaluations."""
    return [cast(EvaluationRecord, record) for record in records if "eval_loss" in record]


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of a metrics file beyond `step`, and a last line that a crash cut short."""
    if not path.exists():
        return
    temporary = temporary_name(path)
    with open(path, encoding="utf-8", errors="replace") as old, open(temporary, "w", encoding="utf-8") as new:
        for line in old:
            record = _parse(line)
            if line.endswith("\n") and record is not None and record["step"] <= step:
                new.write(line)
        new.flush()
        os.fsync(new.fileno())
    os.replace(temporary, path)
    fsync_folder(path.parent)


def _parse(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    is_record = isinstance(record, dict) and isinstance(record.get("step"), int)
    return cast(Record, record) if is_record else None
