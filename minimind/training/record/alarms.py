"""What somebody who watches a run would notice: spikes, drifts, collapses, stragglers, experts that nobody visits.

Rules over the records of metrics.jsonl, as they come; each alarm is given once, and again only after it had passed.
Knows nothing of ranks, devices or files, and adds no work to a step.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Alarm:
    """Something that deserves a look: a kind for machines, a sentence for people."""

    kind: str
    step: int
    message: str


@dataclass(frozen=True)
class Limits:
    """When a rule speaks. Windows are in records."""

    window: int = 50
    """Steps that a median is taken over."""
    spike_deviations: float = 8.0
    """Loss above the window's median, in standard deviations estimated from the window."""
    spike_least: float = 0.3
    """And at least so many nats."""
    drift_factor: float = 4.0
    """Median gradient norm, over its lowest so far."""
    scale_factor: float = 256.0
    """Loss scale, below its highest within four windows."""
    expert_share: float = 0.05
    """Load of an expert over the window, as a share of an even one."""
    expert_tokens: float = 100.0
    """Tokens that an even load must be in the window, for the share to mean anything."""
    speed_loss: float = 0.2
    """Throughput lost against the best window so far."""
    slow_rank: float = 1.25
    """A rank's own time over the median of the ranks."""
    data_share: float = 0.2
    """Share of the step in which the slowest rank waits for data."""
    least_seconds: float = 30.0
    """A rule about time looks at no less than this: shorter hitches are everybody's."""
    evaluations: int = 3
    """Evaluations that rise one after the other."""


class AlarmWatch:
    """Takes the records of a run in their order; `observe` gives the alarms that a record raises.

    Args:
        hosts: name of the host of each rank, to name a slow one.
    """

    def __init__(self, limits: Limits | None = None, hosts: Sequence[str] = ()) -> None:
        self._limits = limits or Limits()
        self._hosts = tuple(hosts)
        self._recent: deque[Mapping[str, Any]] = deque(maxlen=4 * self._limits.window)
        self._lowest_norm = math.inf
        self._best_speed = 0.0
        self._evaluations: deque[tuple[float, float]] = deque(maxlen=self._limits.evaluations + 1)
        self._losses_since: list[float] = []
        self._raised: set[str] = set()

    def observe(self, record: Mapping[str, Any]) -> list[Alarm]:
        """The alarms of one record, of a step or of an evaluation."""
        if "eval_loss" in record:
            return self._settle(record["step"], {"overfitting": self._overfitting(record)})
        found: dict[str, str | None] = {}
        rules: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
            "loss_spike": self._loss_spike,
            "gradient_drift": self._gradient_drift,
            "loss_scale_collapse": self._scale_collapse,
            "dying_expert": self._dying_expert,
            "throughput": self._throughput,
            "slow_rank": self._slow_rank,
            "data_wait": self._data_wait,
        }
        # The spike is judged against what came before it.
        found["loss_spike"] = rules.pop("loss_spike")(record)
        self._recent.append(record)
        loss = _number(record, "loss")
        if loss is not None:
            self._losses_since.append(loss)
        for kind, rule in rules.items():
            found[kind] = rule(record)
        return self._settle(record["step"], found)

    def _settle(self, step: int, found: Mapping[str, str | None]) -> list[Alarm]:
        alarms = []
        for kind, message in found.items():
            if message is None:
                self._raised.discard(kind)
            elif kind not in self._raised:
                self._raised.add(kind)
                alarms.append(Alarm(kind, step, message))
        return alarms

    def _window(self, name: str, size: int | None = None) -> list[float]:
        """The last values of a figure, oldest first; empty where they do not fill the window."""
        size = size or self._limits.window
        values = [value for record in list(self._recent)[-size:] if (value := _number(record, name)) is not None]
        return values if len(values) == size else []

    def _loss_spike(self, record: Mapping[str, Any]) -> str | None:
        loss, window = _number(record, "loss"), self._window("loss")
        if loss is None or not window:
            return None
        middle = statistics.median(window)
        # 1.4826 times the median deviation is the standard deviation of normal noise, whatever the outliers.
        spread = 1.4826 * statistics.median(abs(value - middle) for value in window)
        if loss - middle <= max(self._limits.spike_deviations * spread, self._limits.spike_least):
            return None
        return (
            f"loss jumped to {loss:.3f} from {middle:.3f}, the median of {len(window)} steps; see the data, lower --lr"
        )

    def _gradient_drift(self, record: Mapping[str, Any]) -> str | None:
        window = self._window("grad_norm")
        if not window:
            return None
        middle = statistics.median(window)
        self._lowest_norm = min(self._lowest_norm, middle)
        if middle < self._limits.drift_factor * self._lowest_norm:
            return None
        return (
            f"gradient norm has drifted to {middle:.3g} from {self._lowest_norm:.3g}: about to diverge; lower --lr or "
            "--max-grad-norm"
        )

    def _scale_collapse(self, record: Mapping[str, Any]) -> str | None:
        now = _number(record, "loss_scale")
        if now is None:
            return None
        highest = max(value for item in self._recent if (value := _number(item, "loss_scale")) is not None)
        if now * self._limits.scale_factor > highest and (now > 1 or highest <= 1):
            return None
        return (
            f"loss scale fell to {now:g} from {highest:g}: gradients overflow in fp16; use --precision bf16, lower --lr"
        )

    def _dying_expert(self, record: Mapping[str, Any]) -> str | None:
        loads = [item["expert_load"] for item in list(self._recent)[-self._limits.window :] if item.get("expert_load")]
        if len(loads) < self._limits.window:
            return None
        dying = []
        for layer in range(len(loads[0])):
            totals = [sum(load[layer][expert] for load in loads) for expert in range(len(loads[0][layer]))]
            even = sum(totals) / len(totals)
            if even >= self._limits.expert_tokens:
                least = self._limits.expert_share * even
                dying += [(layer, expert) for expert, count in enumerate(totals) if count < least]
        if not dying:
            return None
        names = ", ".join(f"{expert} of expert layer {layer}" for layer, expert in dying[:5])
        more = f" and {len(dying) - 5} more" if len(dying) > 5 else ""
        return f"hardly a token reaches expert {names}{more}: raise --router-aux-loss-coef"

    def _throughput(self, record: Mapping[str, Any]) -> str | None:
        window = self._timed_window("tokens_per_second")
        if not window:
            return None
        middle = statistics.median(window)
        self._best_speed = max(self._best_speed, middle)
        if middle > (1 - self._limits.speed_loss) * self._best_speed:
            return None
        return f"throughput fell to {middle:,.0f} tokens/s from {self._best_speed:,.0f}: look at clocks and network"

    def _slow_rank(self, record: Mapping[str, Any]) -> str | None:
        if not self._timed_window("tokens_per_second"):
            return None
        seen = [item for item in list(self._recent)[-self._limits.window :] if "slowest_rank" in item]
        slow = [
            item["slowest_rank"]
            for item in seen
            if item["slowest_rank_seconds"] > self._limits.slow_rank * item["median_rank_seconds"]
        ]
        if not slow or 2 * len(slow) <= len(seen):
            return None
        rank = statistics.mode(slow)
        if 2 * slow.count(rank) <= len(seen):  # now this one, now that: noise
            return None
        of_it = [item for item in seen if item["slowest_rank"] == rank]
        ratio = statistics.median(item["slowest_rank_seconds"] / item["median_rank_seconds"] for item in of_it)
        where = f" on {self._hosts[rank]}" if rank < len(self._hosts) else ""
        return f"rank {rank}{where} takes {ratio:.1f} times as long as the others: all wait for it"

    def _data_wait(self, record: Mapping[str, Any]) -> str | None:
        recent = list(self._recent)[-self._limits.window :]
        seen = [item for item in recent if _number(item, "data_seconds") is not None]
        if not seen or not self._timed_window("step_seconds"):
            return None
        share = statistics.median(item["data_seconds"] / item["step_seconds"] for item in seen)
        if share < self._limits.data_share:
            return None
        return f"{share:.0%} of a step is waiting for data: raise --num-workers, or bring the shards nearer"

    def _timed_window(self, name: str) -> list[float]:
        """As `_window`, where the window also lasted long enough to judge time by it."""
        window, seconds = self._window(name), self._window("step_seconds")
        return window if seconds and sum(seconds) >= self._limits.least_seconds else []

    def _overfitting(self, record: Mapping[str, Any]) -> str | None:
        loss = _number(record, "eval_loss")
        if loss is None or not self._losses_since:
            return None
        self._evaluations.append((loss, statistics.fmean(self._losses_since)))
        self._losses_since.clear()
        if len(self._evaluations) <= self._limits.evaluations:
            return None
        pairs = list(zip(self._evaluations, list(self._evaluations)[1:], strict=False))
        if not all(after[0] > before[0] and after[1] < before[1] for before, after in pairs):
            return None
        first = self._evaluations[0]
        return (
            f"evaluation rises ({first[0]:.3f} to {loss:.3f}) while training falls: it learns the shards by "
            "heart; stop, or give it more data"
        )


def _number(record: Mapping[str, Any], name: str) -> float | None:
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)
