"""Where the time of a step goes: between two readings of the device, and on this rank alone.

A step ends on all ranks together, so its length does not tell a slow rank from one that waits for it. A rank's own
time does: waiting for data, and forward passes, which hold no collective below ZeRO-3.
"""

import collections
import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.profiler import record_function

from minimind.accelerator import has_streams, record_event
from minimind.training.record.run_files import StepRecord

Mark = float | torch.Event
"""A moment: of the host's clock, or, where there are streams, an event between two operations of the device."""


class Reading(NamedTuple):
    """The times between two readings, each a pair of marks. On an accelerator the device must have passed them."""

    whole: tuple[Mark, Mark]
    data: list[tuple[Mark, Mark]]
    forward: list[tuple[Mark, Mark]]


def seconds(spans: list[tuple[Mark, Mark]]) -> float:
    """Seconds of `spans` together."""
    total = 0.0
    for begin, end in spans:
        if isinstance(begin, float):
            assert isinstance(end, float)
            total += end - begin
        else:
            assert not isinstance(end, float)
            total += begin.elapsed_time(end) / 1000
    return total


class StepTimer:
    """Marks the parts of the steps between two readings. On an accelerator the host does not wait for what it marks."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: collections.defaultdict[str, list[tuple[Mark, Mark]]] = collections.defaultdict(list)
        self.restart()

    def _mark(self) -> Mark:
        # Without streams the host waits at each reading. Apple's events are no clock: in torch 2.13 to ask one may hang
        # (pytorch pull request 196395).
        return record_event(self._device, timed=True) if has_streams(self._device) else time.perf_counter()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Around a part of a step ("data": taking the next batches, "forward", ...): a range of that name in a
        profile."""
        mark = self._mark if name == "forward" else time.perf_counter
        begin = mark()
        with record_function(f"step.{name}"):
            yield
        self._spans[name].append((begin, mark()))

    def restart(self) -> None:
        """Begin the time between two readings now: an evaluation or a save is no part of a step."""
        self._began = self._mark()

    def read(self) -> Reading:
        """The marks since the last reading or restart."""
        now, spans = self._mark(), self._spans
        reading = Reading((self._began, now), spans["data"], spans["forward"])
        self._began, self._spans = now, collections.defaultdict(list)
        return reading


def describe_times(step: int, times: list[float]) -> StepRecord:
    """The rank times of a step's record, from (seconds of data wait, of forward) of each rank in turn."""
    waits, forwards = times[::2], times[1::2]
    record: StepRecord = {"step": step, "data_seconds": max(waits)}
    own = [wait + forward for wait, forward in zip(waits, forwards, strict=True)]
    if len(own) > 1:
        slowest = own.index(max(own))
        record["slowest_rank"] = slowest
        record["slowest_rank_seconds"] = own[slowest]
        # Of the other ranks: with two ranks, a median over both would hide half of the difference.
        record["median_rank_seconds"] = statistics.median(own[:slowest] + own[slowest + 1 :])
    return record
