"""Conversations to shards for fine-tuning: python -m data_prep.tokenize_chat.

Prepared like a corpus; beside the tokens a third array says which of them are trained: what the assistant wrote, and
the token that closes it.
"""

import sys
from dataclasses import dataclass

import tyro

from data_prep.tokenize_corpus import PrepareFlags, prepare
from data_prep.writing.encode_chat import ChatOptions
from minimind.cli import parse_flags
from minimind.data.dataset import PackedDataset
from minimind.data.shards import open_split
from minimind.errors import run_main


@dataclass(frozen=True, kw_only=True)
class TokenizeChatFlags(PrepareFlags, ChatOptions):
    """Prepare conversations: token shards with targets, of a training and a validation split."""


def main() -> None:
    flags = parse_flags(
        TokenizeChatFlags, sys.argv[1:], default=tyro.MISSING_NONPROP, prog="python -m data_prep.tokenize_chat"
    )
    prepare(flags, ChatOptions)
    if flags.seq_len is not None:
        windows = PackedDataset(open_split(flags.output, "train"), flags.seq_len)
        print(
            f"{len(windows):,} windows of {flags.seq_len} tokens: {windows.padding:.1%} padding, "
            f"{windows.num_cut:,} conversations cut at their end"
        )


if __name__ == "__main__":
    run_main(main)
