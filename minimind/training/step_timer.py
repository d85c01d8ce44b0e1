"""Where a rank's own time goes within a step: waiting for data, and its forward passes.

A step ends on all ranks together, so its length says nothing of one rank; the forward has no collective below ZeRO-3
and does. On CUDA the device's own events are read, and only when the caller has waited for the device anyhow.
"""

import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import record_function


class StepClock:
    """Adds up seconds between two readings."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._data = 0.0
        self._forward = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around taking the next batches."""
        began = time.perf_counter()
        with self.part("data"):
            yield
        self._data += time.perf_counter() - began

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Around a part of a step that only a profile asks for."""
        with record_function(f"step.{name}"):
            yield

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Around one forward pass."""
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

    def read(self) -> tuple[float, float]:
        """Seconds of waiting for data and of forward passes since the last reading; the device must have done them."""
        self._forward += sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        self._events.clear()
        found = (self._data, self._forward)
        self._data = self._forward = 0.0
        return found


def describe_times(times: list[float]) -> dict[str, Any]:
    """What a record says of the ranks' own time, from (seconds of waiting for data, of forward) of each in turn."""
    waits, forwards = times[::2], times[1::2]
    record: dict[str, Any] = {"data_seconds": max(waits)}
    own = [wait + forward for wait, forward in zip(waits, forwards, strict=True)]
    if len(own) > 1:
        slowest = own.index(max(own))
        record["slowest_rank"] = slowest
        record["slowest_rank_seconds"] = own[slowest]
        # Of the others: with two ranks, a median over both would hide half of the difference.
        record["median_rank_seconds"] = statistics.median(own[:slowest] + own[slowest + 1 :])
    return record
