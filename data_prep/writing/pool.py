"""A function over many items on all cores: results in order, a bounded number of items in memory.

Works under any start method; a worker that dies is an error, and workers end when their parent is killed.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from minimind.errors import UserError
from minimind.host import count_cores

T = TypeVar("T")
R = TypeVar("R")


def count_workers(flag: int) -> int:
    """What `--workers` means: 0 is one for each core that this process may use."""
    if flag < 0:
        raise UserError(f"--workers {flag}: must be at least 1, or 0 for one for each core")
    return flag or count_cores()


def map_ordered(function: Callable[[T], R], items: Iterable[T], workers: int) -> Generator[R, None, None]:
    """`map(function, items)` in `workers` processes; 1 means this process.

    Items are taken as results are consumed: no more than about two for each worker are in memory. Close the iterator
    (contextlib.closing) to end the workers early. Raises `UserError` when one of them dies.
    """
    if workers == 1:
        yield from map(function, items)
        return
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _watch_parent)
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            with _interrupt_later():
                pending.append(executor.submit(function, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError("a worker process died (killed, or out of memory): try again, with fewer --workers") from None
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _interrupt_later() -> Iterator[None]:
    """Ctrl-C goes to the whole group, and the parent alone answers it: workers started in here inherit the signal
    blocked, and the parent, whose other threads may still receive it, meets it once they are started."""
    received: list[tuple[Any, ...]] = []
    handler = signal.signal(signal.SIGINT, lambda *args: received.append(args))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if received and callable(handler):
            handler(*received[0])


def _watch_parent() -> None:
    """End this worker with its parent, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()
