"""What ends or steers a run from outside its loop: stop requests, the run folder's lock, the watchdog."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minimind.distributed.collectives import on_first_rank
from minimind.distributed.launchers.watch import LauncherWatch
from minimind.distributed.stop_requests import Requests, StopRequests, listen
from minimind.distributed.watchdog import Watchdog
from minimind.training.run_lock import RunLock, RunLockError, hold_run_folder


@dataclass(frozen=True)
class RunControl:
    """Stop requests, lock and watchdog of one rank."""

    run_dir: Path
    requests: StopRequests
    watchdog: Watchdog
    lock: RunLock | None = None  # held by rank 0 for the run

    def report(self, step: int, phase: str) -> None:
        """Tell the watchdog where this rank is."""
        self.watchdog.report(step, phase)

    def all_reduce(self, is_busy: bool, num_late: int = 0) -> tuple[Requests, bool, int]:
        """The requests of all ranks together, whether any of them is busy, and the most figures that any of them still
        waits for. Every rank calls this: one collective.

        Raises:
            RunLockError: on every rank: another job has taken the run folder.
        """
        is_lost = self.lock is not None and self.lock.is_lost
        requests, (busy, lost, late) = self.requests.all_reduce((int(is_busy), int(is_lost), num_late))
        if lost:
            raise RunLockError(f"{self.run_dir}: another job has taken this run over; stopped")
        return requests, bool(busy), late


@contextlib.contextmanager
def hold_run(run_dir: Path, watchdog: Watchdog, launcher: LauncherWatch, *, is_first: bool) -> Iterator[RunControl]:
    """Listen for requests and hold the run folder's lock while the block runs. Every rank calls this.

    Raises:
        UserError: on every rank: another job works in the folder, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        requests = stack.enter_context(listen(run_dir if is_first else None, launcher.has_ended))
        stack.enter_context(launcher.outlive_readers())
        lock: RunLock | None = None

        def take() -> None:
            nonlocal lock
            lock = stack.enter_context(hold_run_folder(run_dir))

        on_first_rank(take)
        yield RunControl(run_dir, requests, watchdog, lock)
