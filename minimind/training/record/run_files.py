"""The files of a run folder; metrics.jsonl: the fields of its lines, their writer and reader. Needs no torch."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

from minimind.errors import UserError

METRICS_NAME = "metrics.jsonl"
RUN_CONFIG_NAME = "run_config.json"
DS_CONFIG_NAME = "ds_config.json"


MOST_LOADS = 256
STEPS_BETWEEN_LOADS = 50
"""Of more experts than `MOST_LOADS`, all layers together: 60 layers of 256 would be 120 KB in every line, 30 GB in a
run."""


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
    # Mixtures only, by the name of the source: mean over its targets of the step, if it has any; tokens read so far.
    source_loss: dict[str, float]
    source_tokens: dict[str, int]
    # Preferences only, means over the pairs: see `minimind.training.objectives.preference.FIGURES`.
    reward_accuracy: float | None
    reward_margin: float | None
    chosen_log_prob: float | None
    rejected_log_prob: float | None
    kl: float | None
    # Distillation only, means over the targets: in nats, and share of the tokens with the same best choice.
    teacher_kl: float | None
    teacher_agreement: float | None
    # grpo only: see `minimind.training.objectives.grpo`. Means over the answers...
    reward: float | None
    reward_std: float | None  # within a group
    no_signal: float | None  # share of the answers whose group has earned alike
    answer_length: float | None  # tokens
    cut_share: float | None  # share of the answers that were cut at max_new_tokens
    # ... and over their tokens.
    ratio: float | None
    log_prob_gap: float | None
    clip_fraction: float | None
    # On steps that read the device. A rank's own time is its wait for data and its forward passes.
    data_seconds: float | None  # longest wait for data of any rank
    slowest_rank: int  # several ranks only, and so the next two
    slowest_rank_seconds: float
    median_rank_seconds: float  # of the other ranks
    # Models with experts only.
    aux_loss: float | None  # summed over the layers, coefficients included
    # The next two of many experts only at every `STEPS_BETWEEN_LOADS`th step.
    expert_load: list[list[int]]  # tokens that chose each expert, a row for each layer of experts
    expert_balance: ExpertBalance
    load_entropy: float | None  # mean over the layers
    dropped_share: float | None  # mean over the layers


class EvaluationRecord(_AtStep, total=False):
    """One evaluation."""

    eval_loss: float | None  # nats a token
    eval_bits_per_byte: float | None
    eval_perplexity: float | None
    eval_targets: int  # tokens predicted, or pairs compared
    # Mixtures only, by the name of the source; the figures above are then means by the sources' shares.
    eval_source_loss: dict[str, float]
    eval_source_bits_per_byte: dict[str, float]
    eval_reward_accuracy: float | None  # preferences only
    eval_reward_margin: float | None
    eval_teacher_kl: float | None  # distillation only
    eval_reward: float | None  # grpo only, and so the next: of the likeliest answers
    eval_answer_length: float | None  # tokens


Record = StepRecord | EvaluationRecord


def finite(record: Record) -> Any:
    """The record with None for every figure that is not finite, or was a string in the file."""
    return {
        key: None if isinstance(value, str) or (isinstance(value, float) and not math.isfinite(value)) else value
        for key, value in record.items()
    }


def figures_by_source(record: Record) -> dict[str, float]:
    """The figures of the sources of a mixture, each by the name `FIGURE/SOURCE`."""
    names = ("source_loss", "source_tokens", "eval_source_loss", "eval_source_bits_per_byte")
    return {
        f"{name}/{source}": value for name in names for source, value in dict[str, Any](record).get(name, {}).items()
    }


def read_records(path: Path, tail_bytes: int | None = None) -> list[Record]:
    """The records of a metrics.jsonl, which may be growing: a line cut short is skipped. No file: no records.

    Args:
        tail_bytes: read no more than so much of the end.
    """
    return [finite(record) for line in read_objects(path, tail_bytes) if (record := _as_record(line)) is not None]


def read_objects(path: Path, tail_bytes: int | None = None) -> list[Any]:
    """The JSON values of a file's lines; a line that is none is skipped. No file: none."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        if tail_bytes is not None and path.stat().st_size > tail_bytes:
            file.seek(-tail_bytes, os.SEEK_END)
            file.readline()  # the rest of a line
        lines = file.read().splitlines()
    return [value for line in lines if (value := _parse(line)) is not None]


def append_object(path: Path, content: Mapping[str, Any]) -> None:
    """Append a line of JSON, on a line of its own even after one that a crash cut short.

    Raises:
        UserError: the disk refuses.
    """
    line = json.dumps(content).encode() + b"\n"
    try:
        with open(path, "a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; free disk space and resume the run") from None


def steps_of(records: Iterable[Record]) -> list[StepRecord]:
    """The records of optimizer steps."""
    return [cast(StepRecord, record) for record in records if "loss" in record]


def evaluations_of(records: Iterable[Record]) -> list[EvaluationRecord]:
    """The records of evaluations."""
    return [cast(EvaluationRecord, record) for record in records if "eval_loss" in record]


def keep_until(path: Path, step: int) -> int:
    """Cut a metrics file after its last line that is not beyond `step`, and so a last line that a crash cut short.
    Gives the last step that was there. Reads no more of the end than it has to."""
    if not path.exists():
        return 0
    size, tail = path.stat().st_size, 1 << 20
    while True:
        begin, last, end = max(0, size - tail), 0, 0
        with open(path, "rb") as file:
            if file.seek(begin):
                file.readline()  # the rest of a line
            for line in file:
                record = _as_record(_parse(line))
                if line.endswith(b"\n") and record is not None:
                    last = max(last, record["step"])
                    end = file.tell() if record["step"] <= step else end
        if end or not begin:
            break
        tail *= 8
    if end < size:
        with open(path, "r+b") as file:
            file.truncate(end)
            os.fsync(file.fileno())
    return last


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _as_record(value: Any) -> Record | None:
    is_record = isinstance(value, dict) and isinstance(value.get("step"), int)
    return cast(Record, value) if is_record else None
