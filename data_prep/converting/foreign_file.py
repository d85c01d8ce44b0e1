"""What files of other people's formats have in common: documents of token ids, in a file that is checked before."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minimind.errors import UserError


@dataclass(frozen=True)
class ForeignTokens:
    """One token file, mapped, and where its documents end. `name` is for errors."""

    name: str
    tokens: np.ndarray  # (num_tokens,) integer
    ends: np.ndarray  # (num_documents,) int64, increasing, the last one num_tokens


def map_tokens(path: Path, dtype: np.dtype, num_tokens: int) -> np.ndarray:
    """The tokens of a file, (num_tokens,), mapped read-only. Raises `UserError` unless it has exactly so many."""
    size, expected = stat_size(path), num_tokens * dtype.itemsize
    if size != expected:
        raise UserError(f"{path} has {size:,} bytes, and its index says {expected:,}: get both files again")
    return np.memmap(path, dtype=dtype, mode="r") if num_tokens else np.empty(0, dtype=dtype)


def stat_size(path: Path) -> int:
    """The size of a file in bytes. Raises `UserError` if there is none."""
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
