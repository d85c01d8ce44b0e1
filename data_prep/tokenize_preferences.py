"""Pairs of a preferred and a rejected answer, or answers with a label, to shards: python -m
data_prep.tokenize_preferences.

Prepared like conversations; a pair is one document, which no split, shard or window divides.
"""

import sys
from dataclasses import dataclass

import tyro

from data_prep.tokenize_corpus import PrepareFlags, prepare
from data_prep.writing.encode_chat import PreferenceOptions
from minimind.cli import parse_flags
from minimind.errors import run_main


@dataclass(frozen=True, kw_only=True)
class TokenizePreferencesFlags(PrepareFlags, PreferenceOptions):
    """Prepare preferences: token shards of pairs, of a training and a validation split."""


def main() -> None:
    flags = parse_flags(
        TokenizePreferencesFlags,
        sys.argv[1:],
        default=tyro.MISSING_NONPROP,
        prog="python -m data_prep.tokenize_preferences",
    )
    prepare(flags, PreferenceOptions)


if __name__ == "__main__":
    run_main(main)
