"""Alarms over a run's metrics: loss spikes, gradient drift, loss-scale collapse, slow ranks, dying experts.

Rules over the records of metrics.jsonl as they come. Each alarm is raised once, and again only after it had passed.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from minimind.training.record.events import Event
from minimind.training.record.run_files import Record


@dataclass(frozen=True)
class Limits:
    """Thresholds of the rules. Windows are in records."""

    window: int = 50  # steps that a median is taken over
    spike_deviations: float = 8.0  # loss above the median, in standard deviations estimated from the window,
    spike_least: float = 0.3  # and at least so many nats
    drift_factor: float = 4.0  # median gradient norm over its lowest so far
    scale_factor: float = 256.0  # loss scale below its highest within four windows
    expert_share: float = 0.05  # load of an expert over the window, as a share of an even load
    expert_tokens: float = 100.0  # even load in tokens over the window, below which the share says nothing
    speed_loss: float = 0.2  # throughput lost against the best window so far
    slow_rank: float = 1.25  # a rank's own time over the median of the other ranks
    data_share: float = 0.2  # share of the step in which the slowest rank waits for data
    least_seconds: float = 30.0  # of a window for rules about time: every run has short hitches
    evaluations: int = 3  # that rise in a row


class AlarmWatch:
    """Takes the records of a run in order; `observe` gives the alarms that a record raises.

    Args:
        hosts: name of the host of each rank, to name a slow one.
    """

    def __init__(self, limits: Limits | None = None, hosts: Sequence[str] = ()) -> None:
        self._limits = limits or Limits()
        self._hosts = tuple(hosts)
        self._recent: deque[Mapping[str, Any]] = deque(maxlen=4 * self._limits.window)
        self._window: list[Mapping[str, Any]] = []  # the newest `limits.window` of these
        self._loads: deque[np.ndarray] = deque()  # (layers, experts) of the newest `limits.window` records with a load
        self._total_load: np.ndarray | int = 0  # their sum
        self._lowest_norm = math.inf
        self._best_speed = 0.0
        self._evaluations: deque[tuple[float, float]] = deque(maxlen=self._limits.evaluations + 1)
        self._losses: list[float] = []  # since the last evaluation
        self._raised: set[str] = set()

    def observe(self, record: Record) -> list[Event]:
        """The alarms of one record, of a step or of an evaluation."""
        if "eval_loss" in record:
            return self._settle(record["step"], {"overfitting": self._overfitting(record)})
        found = {"loss_spike": self._loss_spike(record)}  # judged against the steps before it
        self._recent.append({key: value for key, value in record.items() if not key.startswith("expert_")})
        self._window = list(self._recent)[-self._limits.window :]
        self._losses += _values([record], "loss")
        found["gradient_drift"] = self._gradient_drift()
        found["loss_scale_collapse"] = self._scale_collapse()
        found["dying_expert"] = self._dying_expert(dict[str, Any](record).get("expert_load"))
        found["throughput"] = self._throughput()
        found["slow_rank"] = self._slow_rank()
        found["data_wait"] = self._data_wait()
        return self._settle(record["step"], found)

    def _settle(self, step: int, found: Mapping[str, str | None]) -> list[Event]:
        standing = {kind: message for kind, message in found.items() if message is not None}
        alarms = [Event(step, "alarm", message, kind) for kind, message in standing.items() if kind not in self._raised]
        self._raised = (self._raised - found.keys()) | standing.keys()
        return alarms

    def _median(self, name: str, *, is_time: bool = False) -> float | None:
        """The median of a figure over a full window, which for a time must have lasted `least_seconds`; else None."""
        values = _values(self._window, name)
        if len(values) < self._limits.window:
            return None
        if is_time and sum(_values(self._window, "step_seconds")) < self._limits.least_seconds:
            return None
        return statistics.median(values)

    def _loss_spike(self, record: Mapping[str, Any]) -> str | None:
        loss, middle = record.get("loss"), self._median("loss")
        if loss is None or middle is None:
            return None
        # 1.4826 times the median deviation is the standard deviation of normal noise, whatever the outliers.
        spread = 1.4826 * statistics.median(abs(value - middle) for value in _values(self._window, "loss"))
        if loss - middle <= max(self._limits.spike_deviations * spread, self._limits.spike_least):
            return None
        return (
            f"loss jumped to {loss:.3f} from {middle:.3f}, the median of {self._limits.window} steps; look at the "
            "data, lower --lr"
        )

    def _gradient_drift(self) -> str | None:
        middle = self._median("grad_norm")
        if middle is None:
            return None
        lowest = self._lowest_norm = min(self._lowest_norm, middle)
        if middle < self._limits.drift_factor * lowest:
            return None
        return (
            f"gradient norm has drifted to {middle:.3g} from {lowest:.3g}: about to diverge; lower --lr or "
            "--max-grad-norm"
        )

    def _scale_collapse(self) -> str | None:
        now = self._window[-1].get("loss_scale")
        if now is None:
            return None
        highest = max(_values(self._recent, "loss_scale"))
        if now * self._limits.scale_factor > highest and (now > 1 or highest <= 1):
            return None
        return (
            f"loss scale fell to {now:g} from {highest:g}: gradients overflow in fp16; use --precision bf16, lower --lr"
        )

    def _dying_expert(self, load: Sequence[Sequence[int]] | None) -> str | None:
        if load:
            self._loads.append(np.array(load))
            self._total_load += self._loads[-1]
        if len(self._loads) > self._limits.window:
            self._total_load -= self._loads.popleft()
        if len(self._loads) < self._limits.window:
            return None
        totals = np.asarray(self._total_load)
        even = totals.mean(axis=1, keepdims=True)
        is_dying = (even >= self._limits.expert_tokens) & (totals < self._limits.expert_share * even)
        dying = [f"{expert} of expert layer {layer}" for layer, expert in np.argwhere(is_dying)]
        if not dying:
            return None
        more = f" and {len(dying) - 5} more" if len(dying) > 5 else ""
        return (
            f"less than {self._limits.expert_share:.0%} of an even load for expert {', '.join(dying[:5])}{more}: raise "
            "--router-aux-loss-coef"
        )

    def _throughput(self) -> str | None:
        middle = self._median("tokens_per_second", is_time=True)
        if middle is None:
            return None
        self._best_speed = max(self._best_speed, middle)
        if middle > (1 - self._limits.speed_loss) * self._best_speed:
            return None
        return f"throughput fell to {middle:,.0f} tokens/s from {self._best_speed:,.0f}: look at clocks and network"

    def _slow_rank(self) -> str | None:
        if self._median("step_seconds", is_time=True) is None:
            return None
        ratios = [
            (record["slowest_rank"], record["slowest_rank_seconds"] / record["median_rank_seconds"])
            for record in self._window
            if "slowest_rank" in record
        ]
        slow = [rank for rank, ratio in ratios if ratio > self._limits.slow_rank]
        rank = statistics.mode(slow) if slow else 0
        if 2 * slow.count(rank) <= len(ratios):  # seldom, or a different rank each time: noise
            return None
        ratio = statistics.median(ratio for of, ratio in ratios if of == rank)
        where = f" on {self._hosts[rank]}" if rank < len(self._hosts) else ""
        return f"rank {rank}{where} takes {ratio:.1f} times as long as the other ranks, which wait for it"

    def _data_wait(self) -> str | None:
        waits = [record for record in self._window if record.get("data_seconds") is not None]
        if not waits or self._median("step_seconds", is_time=True) is None:
            return None
        share = statistics.median(record["data_seconds"] / record["step_seconds"] for record in waits)
        if share < self._limits.data_share:
            return None
        return f"{share:.0%} of a step is waiting for data: raise --num-workers, or move the shards to a faster disk"

    def _overfitting(self, record: Mapping[str, Any]) -> str | None:
        loss = record.get("eval_loss")
        if loss is None or not self._losses:
            return None
        self._evaluations.append((loss, statistics.fmean(self._losses)))
        self._losses.clear()
        rises = [now[0] > before[0] and now[1] < before[1] for before, now in pairwise(self._evaluations)]
        if len(rises) < self._limits.evaluations or not all(rises):
            return None
        return (
            f"evaluation loss rises ({self._evaluations[0][0]:.3f} to {loss:.3f}) while training loss falls: the model "
            "overfits; stop, or add data"
        )


def _values(records: Iterable[Mapping[str, Any]], name: str) -> list[float]:
    return [value for record in records if (value := record.get(name)) is not None]
