"""A hash of the windows that ranks took, for comparing runs on any number of ranks."""

import hashlib
from collections.abc import Iterable

from minimind.data.loader import Batch


def hash_stream(batches: Iterable[Batch]) -> int:
    """A signed 64-bit hash of which windows, at which places of the global order, with which tokens and labels.

    It is a sum over windows (modulo 2**64): the sum over ranks, as an integer all-reduce computes it, equals the value
    of one rank that took all of them, in whatever micro-batches.
    """
    total = 0
    for batch in batches:
        for position, input_ids, labels in zip(batch.positions, batch.input_ids, batch.labels, strict=True):
            content = str(position).encode() + input_ids.cpu().numpy().tobytes() + labels.cpu().numpy().tobytes()
            total += int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
    return (total + 2**63) % 2**64 - 2**63
