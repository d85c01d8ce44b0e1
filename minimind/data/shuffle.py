"""The shuffled order of samples: a pseudo-random permutation of each epoch, computed and never stored.

A pure function of seed, epoch and what is ordered; any place of it costs the same.
"""

import functools
import hashlib
import math

import numpy as np

_ROUNDS = 8


class ShuffledOrder:
    """The endless sequence of sample indices in [0, num_samples): epoch after epoch, each a permutation of its own.

    A Feistel network (Luby and Rackoff, 1988) over pairs (left, right) in Z_a x Z_b with a*b just above `num_samples`
    (the generalised network of Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): every round adds a
    keyed hash of one half to the other, which can be undone, so the whole is a bijection. A value outside the range
    is sent through again until it falls inside ("cycle walking"), which keeps it one.
    """

    def __init__(self, num_samples: int, seed: int, fingerprint: str) -> None:
        if num_samples < 1:
            raise ValueError(f"an order of {num_samples} samples")
        self.num_samples = num_samples
        self._left = max(1, math.isqrt(num_samples - 1) + 1)  # ceil(sqrt(n))
        self._right = -(-num_samples // self._left)
        self._keys = functools.lru_cache(maxsize=4)(functools.partial(_derive_keys, seed, fingerprint))

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """The sample indices at these places of the endless sequence: int64, the shape of `positions`."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, places = np.divmod(positions, self.num_samples)
        indices = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            indices[chosen] = self._permute(places[chosen], self._keys(int(epoch)))
        return indices

    def _permute(self, places: np.ndarray, keys: np.ndarray) -> np.ndarray:
        values = self._encrypt(places, keys)
        while (outside := values >= self.num_samples).any():
            values[outside] = self._encrypt(values[outside], keys)
        return values

    def _encrypt(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        left, right = (half.astype(np.uint64) for half in np.divmod(values, self._right))
        a, b = np.uint64(self._left), np.uint64(self._right)
        for left_key, right_key in keys.reshape(-1, 2):
            left = (left + _mix(right, left_key) % a) % a
            right = (right + _mix(left, right_key) % b) % b
        return (left * b + right).astype(np.int64)


def _derive_keys(seed: int, fingerprint: str, epoch: int) -> np.ndarray:
    digest = hashlib.shake_256(f"{seed}/{epoch}/{fingerprint}".encode()).digest(8 * _ROUNDS)
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _mix(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """64 bits to 64 bits, each output bit depending on all of the input: the finaliser of SplitMix64 (Steele, Lea and
    Flood, "Fast Splittable Pseudorandom Number Generators", 2014), twice, with the key between."""
    for addend in (np.uint64(0x9E3779B97F4A7C15), key):
        values = values + addend
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        values = values ^ (values >> np.uint64(31))
    return values
