"""Where the time of a step goes: between two readings of the device, and on this rank alone.

A step ends on all ranks together, so its length does not tell a slow rank from one that waits for it. A rank's own
time does: waiting for data, and forward passes, which hold no collective below ZeRO-3.
"""

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
        self._data = self._forward = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Around a part of a step: a range of that name in a profile."""
        with record_function(f"step.{name}"):
            yield

    @contextlib.contextmanager
    def data_wait(self) -> Iterator[None]:
        """Around taking the next batches."""
        began = time.perf_counter()
        with self.part("data"):
            yield
        self._data += time.perf_counter() - began

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Around one forward pass. On CUDA the device's own events are recorded, as the host does not wait for it."""
        if self._on_cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            with self.part("forward"):
                yield
            end.record()
            self._events.append((begin, end))
            return
        began = time.perf_counter()
        with self.part("forward"):
            yield
        self._forward += time.perf_counter() - began

    def restart(self) -> None:
        """Begin the time between two readings now: an evaluation or a save is no part of a step."""
        self._began = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds since the last reading or restart."""
        return time.perf_counter() - self._began

    def own_seconds(self) -> tuple[float, float]:
        """Seconds of waiting for data and of forward passes since the last reading; the device must have done them."""
        self._forward += sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        self._events.clear()
        found = (self._data, self._forward)
        self._data = self._forward = 0.0
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
