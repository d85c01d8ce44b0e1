"""Who does many like pieces of work: the threads of this process, or all ranks (`collectives`). Needs no torch."""

import concurrent.futures
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

AT_ONCE = 4


class Share(Protocol):
    """`[function(item) for item in items]`, done by several at once."""

    def __call__(self, function: Callable[[Any], T], items: Sequence[Any]) -> list[T]: ...


def share_among_threads(function: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
    """A `Share` by the threads of this process."""
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(function, items))
