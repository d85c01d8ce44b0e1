"""Sizes, durations and tables as text, and sizes from text."""

import re
from collections.abc import Sequence

from minimind.errors import UserError


def format_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def parse_size(text: str, name: str, *, memory: bool = False) -> int:
    """`500MB`, `2GiB` or `1000` -> bytes.

    KiB, MiB, GiB, TiB are powers of 1024; KB, MB, GB, TB (or K, M, G, T) powers of 1000, as of disks and files.

    Args:
        name: the flag, for the error.
        memory: KB, MB, GB and TB are powers of 1024 too, as of GPUs, and a bare number is refused.

    Raises:
        UserError: the text is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?B)?)?", text.strip().upper())
    size = 0.0
    if match is not None and (match[2] or not memory):
        base = 1024 if memory or match[3] == "IB" else 1000
        size = float(match[1]) * base ** " KMGT".index(match[2] or " ")
    if size < 1:
        raise UserError(f"{name}: {text!r} is not a size; write one such as {'80GiB' if memory else '500MB or 5GB'}")
    return round(size)


def format_table(rows: Sequence[Sequence[str]], align: str = "<") -> str:
    """Rows of cells as lines of text, two blanks between columns.

    The last cell of a shorter row may run over the columns it lacks.

    Args:
        align: `<` or `>` for each column; the last one is repeated.
    """
    columns = max(map(len, rows))
    sides = align.ljust(columns, align[-1])
    counted = [row if len(row) == columns else row[:-1] for row in rows]
    widths = [max((len(row[i]) for row in counted if i < len(row)), default=0) for i in range(columns)]
    lines = ("  ".join(f"{row[i]:{sides[i]}{widths[i]}}" for i in range(len(row))) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def format_duration(seconds: float) -> str:
    """65 -> 1:05, 4000 -> 1:06:40."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_hours(hours: float) -> str:
    """0.5 -> '30 minutes', 7.25 -> '7.2 hours', 100 -> '4.2 days'."""
    if hours < 1:
        return f"{hours * 60:.0f} minutes" if hours * 60 >= 1 else "less than a minute"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"
