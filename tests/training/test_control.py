"""A run's control: any rank that has lost the run folder, or is busy, is heard by all."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minimind.distributed.stop_requests import Requests
from minimind.distributed.watchdog import Watchdog
from minimind.training.control import RunControl
from minimind.training.run_lock import RunLockError


def control(others: tuple[int, int, int] = (0, 0, 0), lock: Any = None) -> RunControl:
    """The control of one of two ranks; `others` is (busy, lock lost, late figures) of the other one."""

    def all_reduce(values: tuple[int, ...]) -> tuple[Requests, tuple[int, ...]]:
        return Requests(save=True), tuple(map(max, values, others))

    requests: Any = SimpleNamespace(all_reduce=all_reduce)
    return RunControl(Path("runs/mine"), requests, Watchdog(), lock)


def test_requests_and_busy_ranks_are_those_of_all():
    assert control().all_reduce(False) == (Requests(save=True), False, 0)
    assert control().all_reduce(True) == (Requests(save=True), True, 0)
    assert control(others=(1, 0, 0)).all_reduce(False) == (Requests(save=True), True, 0)


@pytest.mark.parametrize("case", [{"lock": SimpleNamespace(is_lost=True)}, {"others": (0, 1, 0)}])
def test_a_lost_lock_stops_every_rank(case):
    with pytest.raises(RunLockError, match="runs/mine: another job has taken this run over; stopped"):
        control(**case).all_reduce(False)
    held = SimpleNamespace(is_lost=False)
    assert control(lock=held).all_reduce(False) == (Requests(save=True), False, 0)
