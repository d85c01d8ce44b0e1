"""The shuffled order of samples: a pseudo-random permutation of each epoch, computed and never stored.

A pure function of seed, epoch and what is ordered; any place of it costs the same.
"""

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np

_ROUNDS = 8


class ShuffledOrder:
    """The endless sequence of sample indices in [0, num_samples): epoch after epoch, each a permutation of its own.

    A Feistel network (Luby and Rackoff, 1988) over pairs (left, right) in Z_a x Z_b with a*b just above `num_samples`
    (the generalised network of Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): every round adds a
    keyed hash of one half to the other, which can be undone, so the whole is a bijection. A value outside the range
    is sent through again until it falls inside ("cycle walking"), which keeps it one.

    Args:
        taken: samples taken before, by the fingerprint of what they are of: the sequence goes on behind its own.
    """

    def __init__(self, num_samples: int, seed: int, fingerprint: str, taken: Mapping[str, int] | None = None) -> None:
        if num_samples < 1:
            raise ValueError(f"an order of {num_samples} samples")
        self.num_samples = num_samples
        self._fingerprint, self._before = fingerprint, dict(taken or {})
        self._first = self._before.get(fingerprint, 0)
        self.left = max(1, math.isqrt(num_samples - 1) + 1)  # ceil(sqrt(n))
        self.right = -(-num_samples // self.left)
        self.keys = functools.lru_cache(maxsize=4)(functools.partial(_derive_keys, seed, fingerprint))

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """The sample indices at these places of the endless sequence: int64, the shape of `positions`."""
        positions = np.asarray(positions, dtype=np.int64)
        return shuffle([self], np.zeros_like(positions), positions + self._first)

    def taken(self, place: int) -> dict[str, int]:
        """Samples taken before `place`, by the fingerprint of what they are of."""
        return self._before | {self._fingerprint: self._first + place}


def shuffle(orders: Sequence[ShuffledOrder], chosen: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The sample indices at places of several orders at once, each by the order that `chosen` numbers: int64, the shape
    of `positions`."""
    shape, chosen, positions = positions.shape, chosen.ravel(), positions.ravel()
    sizes, left, right = (
        np.array([getattr(order, name) for order in orders])[chosen] for name in ("num_samples", "left", "right")
    )
    epochs, values = np.divmod(positions, sizes)
    keys = np.empty((_ROUNDS, len(values)), dtype=np.uint64)
    for number, epoch in set(zip(chosen.tolist(), epochs.tolist(), strict=True)):
        keys[:, (chosen == number) & (epochs == epoch)] = orders[number].keys(epoch)[:, None]
    outside = np.arange(len(values))
    while outside.size:
        values[outside] = _encrypt(values[outside], left[outside], right[outside], keys[:, outside])
        outside = outside[values[outside] >= sizes[outside]]
    return values.reshape(shape)


def _encrypt(values: np.ndarray, lefts: np.ndarray, rights: np.ndarray, keys: np.ndarray) -> np.ndarray:
    a, b = lefts.astype(np.uint64), rights.astype(np.uint64)
    left: np.ndarray
    right: np.ndarray
    left, right = (half.astype(np.uint64) for half in np.divmod(values, rights))
    for left_key, right_key in zip(keys[::2], keys[1::2], strict=True):
        left = (left + _mix(right, left_key) % a) % a
        right = (right + _mix(left, right_key) % b) % b
    return (left * b + right).astype(np.int64)


def _derive_keys(seed: int, fingerprint: str, epoch: int) -> np.ndarray:
    digest = hashlib.shake_256(f"{seed}/{epoch}/{fingerprint}".encode()).digest(8 * _ROUNDS)
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _mix(values: np.ndarray, key: np.ndarray) -> np.ndarray:
    """64 bits to 64 bits, a key for each, every output bit depending on all of the input: the finaliser of SplitMix64
    (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014), twice, with the key between."""
    for addend in (np.uint64(0x9E3779B97F4A7C15), key):
        values = values + addend
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        values = values ^ (values >> np.uint64(31))
    return values
