"""Where the time of a step goes: between two readings of the device, and on this rank alone.

A step ends on all ranks together, so its length does not tell a slow rank from one that waits for it. A rank's own
time does: waiting for data, and forward passes, which hold no collective below ZeRO-3.
"""

import collections
import contextlib
import statistics
import time
from collections.abc import Iterator

import torch
from torch.profiler import record_function

from minimind.training.record.run_files import StepRecord


class StepTimer:
    """Adds up seconds between two readings."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._began = time.perf_counter()
        self._seconds: collections.defaultdict[str, float] = collections.defaultdict(float)
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Around a part of a step ("data": taking the next batches, "forward", ...): a range of that name in a profile.
        A forward on CUDA is timed by the device's own events, as the host does not wait for it."""
        events = None
        if self._on_cuda and name == "forward":
            events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            events[0].record()
        began = time.perf_counter()
        with record_function(f"step.{name}"):
            yield
        if events is None:
            self._seconds[name] += time.perf_counter() - began
        else:
            events[1].record()
            self._events.append(events)

    def restart(self) -> None:
        """Begin the time between two readings now: an evaluation or a save is no part of a step."""
        self._began = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds since the last reading or restart."""
        return time.perf_counter() - self._began

    def own_seconds(self) -> tuple[float, float]:
        """Seconds of waiting for data and of forward passes since the last reading; the device must have done them."""
        forward = self._seconds["forward"] + sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        found = (self._seconds["data"], forward)
        self._events.clear()
        self._seconds.clear()
        return found


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
