"""Sizes, counts and durations, from text and to text."""

import re

from minimind.errors import UserError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def format_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def parse_bytes(text: str, name: str) -> int:
    """`80GiB`, `80GB` or `80G` (both 2**30, as GPUs are sold), `500MiB` -> bytes.

    Raises:
        UserError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([MGT])(?:i?B)?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise UserError(f"{name}: {text!r} is no amount of memory; write it as 80GiB")
    return round(float(match[1]) * 2 ** {"M": 20, "G": 30, "T": 40}[match[2].upper()])


def parse_size(text: str) -> int:
    """Bytes of `500MB`, `2GB` or `1000`. Raises `UserError` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise UserError(f"max_shard_size: {text!r} is no size; give one such as 500MB or 5GB")
    return size


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
