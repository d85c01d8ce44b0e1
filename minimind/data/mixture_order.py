"""The order of a mixture: which source, and which of its windows, stands at each place, computed and never stored.

A pure function of the seed, the sources' fingerprints and their shares; any place of it costs the same.
"""

import bisect
import functools
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from minimind.data.mixture import Source
from minimind.data.shuffle import ShuffledOrder, shuffle
from minimind.errors import UserError

MOST_PARTS = 1 << 17
"""Places of the longest period: 0.7 MB, made in 0.2 s. Shares whose common denominator is larger are rounded to it."""


def whole_parts(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """Integers in the proportion of `weights`, of which one is above 0 at least: exactly, or where their sum would be
    above `MOST_PARTS`, rounded to that sum by largest remainders, none that is above 0 to 0."""
    scale = math.lcm(*(weight.denominator for weight in weights))
    parts = [int(weight * scale) for weight in weights]
    parts = [part // math.gcd(*parts) for part in parts]
    if (total := sum(parts)) <= MOST_PARTS:
        return tuple(parts)
    exact = [Fraction(part * MOST_PARTS, total) for part in parts]
    rounded = [max(int(part), part > 0) for part in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: (rounded[i] - exact[i], i))
    for i in by_remainder[: max(0, MOST_PARTS - sum(rounded))]:
        rounded[i] += 1
    rounded[rounded.index(max(rounded))] -= max(0, sum(rounded) - MOST_PARTS)  # what small ones were raised by
    return tuple(part // math.gcd(*rounded) for part in rounded)


@functools.lru_cache(maxsize=64)
def balanced_period(parts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The sources of the sum(parts) places of one period, in which source i stands parts[i] times, spread evenly.

    With share w = parts[i] / sum(parts), source i stands among the first n places of the endlessly repeated period more
    than n*w - 1 and fewer than n*w + 1 times, for every i and n: it is always within one of its share. (That it stays
    within 1 - 1/(2k - 2) for k sources is the best possible: Tijdeman, "The chairman assignment problem", 1980.)

    Proof. Source i keeps within these bounds exactly if its j-th turn (from 0) is one of the places from floor(j/w) to
    ceil((j + 1)/w) - 1. Turns that must lie inside the places [s, t) have s <= j/w and (j + 1)/w <= t, so source i has
    at most t*w - s*w of them, and all sources together at most t - s: as many as there are places. By Hall's theorem,
    for intervals, all turns then find places of their own, and to give each place to the turn that may stand there and
    must stand soonest (earliest deadline first) finds them. At the end of the period every source has had exactly its
    parts, so the next begins as the first did.

    Returns:
        sources: (sum(parts),) uint16, the source of each place.
        turns: (sum(parts),) int32, how often that source stood before, in this period.
    """
    size, count = sum(parts), len(parts)
    turns_of = [(i, part, np.arange(part, dtype=np.int64)) for i, part in enumerate(parts) if part]
    firsts = np.concatenate([turns * size // part for _, part, turns in turns_of])
    # The end of its places, and the source to break ties, in one number.
    deadlines = np.concatenate([-(-(turns + 1) * size // part) * count + i for i, part, turns in turns_of])
    arriving = deadlines[np.argsort(firsts, kind="stable")].tolist()
    waiting: list[int] = []
    chosen, arrived = [], 0
    for number in np.bincount(firsts, minlength=size).tolist():
        for deadline in arriving[arrived : arrived + number]:
            heapq.heappush(waiting, deadline)
        arrived += number
        chosen.append(heapq.heappop(waiting))
    sources = (np.array(chosen) % count).astype(np.uint16)
    turns = np.empty(size, dtype=np.int32)
    for i, part, _ in turns_of:
        turns[sources == i] = np.arange(part)
    return sources, turns


@dataclass(frozen=True)
class Phase:
    """Places from `start` on, up to the next phase, in which the shares are the same."""

    start: int
    parts: tuple[int, ...]
    """Of each source, in its share's proportion; 0: it is not read."""
    taken: tuple[int, ...]
    """Windows of each source before this phase."""
    dry: tuple[int, ...] = ()
    """Sources that have run dry where it starts."""

    def taken_at(self, place: int) -> list[int]:
        """Windows of each source before `place`, which lies in this phase or ends it."""
        periods, rest = divmod(place - self.start, sum(self.parts))
        here = np.bincount(balanced_period(self.parts)[0][:rest], minlength=len(self.parts))
        return [
            taken + periods * part + int(number)
            for taken, part, number in zip(self.taken, self.parts, here, strict=True)
        ]

    def end_of(self, source: int, most: int) -> int:
        """The place up to which `source`, which is read here, gives what is missing to `most` windows."""
        periods, turn = divmod(most - self.taken[source] - 1, self.parts[source])
        within = int(np.flatnonzero(balanced_period(self.parts)[0] == source)[turn])
        return self.start + periods * sum(self.parts) + within + 1


class MixtureOrder:
    """The sequence of window numbers of a mixture, in which the windows of all sources are counted through: those of
    source i begin at `first_windows[i]`. Each source is passed over in its own `ShuffledOrder`, epoch after epoch.

    Where a source has given all the windows that it may, the others take over its share, in their proportion. Within a
    phase each source is within one window of its share at every place (`balanced_period`); over m phases, within m.

    Args:
        shares: (place, weight of each source), by increasing place, the first at 0.
        taken: windows of each source, by fingerprint, that were taken before place 0.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        seed: int,
        shares: Sequence[tuple[int, Sequence[Fraction]]],
        taken: Mapping[str, int],
    ) -> None:
        self.sources = sources
        self.first_windows = np.cumsum([0, *(source.num_windows for source in sources)], dtype=np.int64)[:-1]
        self._orders = [ShuffledOrder(source.num_windows, seed, source.fingerprint) for source in sources]
        self._before = dict(taken)
        self.phases, self.end = self._plan_phases(shares)
        """`end`: the place at which all sources have run dry; None: some never do."""
        if not self.phases:
            raise UserError("shards: every source of the mixture has been read max-epochs times; raise it, or add data")
        self._starts = [phase.start for phase in self.phases]

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """The window numbers at these places: int64, the shape of `positions`.

        Raises:
            UserError: all sources have run dry before one of them.
        """
        positions = np.asarray(positions, dtype=np.int64)
        if self.end is not None and positions.size and int(positions.max()) >= self.end:
            raise UserError(f"shards: every source has run dry after {self.end:,} windows; raise max-epochs")
        windows = np.empty_like(positions)
        numbers = np.searchsorted(self._starts, positions, side="right") - 1
        for number in np.unique(numbers):
            phase, there = self.phases[number], numbers == number
            table, turns = balanced_period(phase.parts)
            periods, rests = np.divmod(positions[there] - phase.start, len(table))
            chosen = table[rests].astype(np.int64)
            turn = np.array(phase.taken)[chosen] + periods * np.array(phase.parts)[chosen] + turns[rests]
            windows[there] = self.first_windows[chosen] + shuffle(self._orders, chosen, turn)
        return windows

    def taken(self, place: int) -> dict[str, int]:
        """Windows taken before `place`, by the fingerprint of their source, those of sources of before among them."""
        phase = self.phases[max(0, bisect.bisect_right(self._starts, place) - 1)]
        counts = phase.taken_at(place)
        return self._before | {source.fingerprint: n for source, n in zip(self.sources, counts, strict=True)}

    def _plan_phases(self, shares: Sequence[tuple[int, Sequence[Fraction]]]) -> tuple[list[Phase], int | None]:
        """The phases, and the place at which nothing is left to read."""
        phases: list[Phase] = []
        taken = [self._before.get(source.fingerprint, 0) for source in self.sources]
        limits = [(i, source.most_windows) for i, source in enumerate(self.sources) if source.most_windows is not None]
        place = 0
        for number, (_, weights) in enumerate(shares):
            until = shares[number + 1][0] if number + 1 < len(shares) else None
            while until is None or place < until:
                dry = tuple(i for i, most in limits if taken[i] >= most)
                present = [Fraction(0) if i in dry else weight for i, weight in enumerate(weights)]
                if not any(present):
                    return phases, place
                phase = Phase(place, whole_parts(present), tuple(taken), dry)
                phases.append(phase)
                ends = [phase.end_of(i, most) for i, most in limits if phase.parts[i]]
                if not ends and until is None:
                    return phases, None
                place = min(ends if until is None else [*ends, until])
                taken = phase.taken_at(place)
        return phases, None
