"""See what one trains on: python -m minimind.data look DIR."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

import numpy as np
import tyro

from minimind.cli import parse_flags
from minimind.data.dataset import open_dataset
from minimind.data.look import (
    TokenPainter,
    describe_documents,
    describe_sources,
    describe_tokens,
    describe_totals,
    describe_window,
)
from minimind.data.shards import SPLITS, ShardReader, find_split
from minimind.data.tokenizer import load_tokenizer
from minimind.errors import UserError, run_main
from minimind.schema import AT_LEAST_0, AT_LEAST_1, Limits, convert


@dataclass(frozen=True)
class LookFlags:
    """Look at a corpus: counts, sources, frequent tokens, random documents, and a window as a model sees it."""

    what: tyro.conf.Positional[Literal["look"]]
    """look: print a corpus for people."""
    folder: tyro.conf.Positional[Path]
    """A corpus folder (with train/ and val/), or one shard folder."""
    split: Literal["train", "val"] = "train"
    """The split to look into."""
    documents: Annotated[int, AT_LEAST_0] = 3
    """Random documents to show."""
    longest: Annotated[int, AT_LEAST_1] = 200
    """Tokens of a document to show."""
    frequent: Annotated[int, AT_LEAST_0] = 20
    """Most frequent tokens to show."""
    seq_len: Annotated[int, AT_LEAST_1] = 128
    """Tokens of the window."""
    window: Annotated[int | None, AT_LEAST_0] = None
    """Number of the window (a random one if it is not given)."""
    document_mask: bool = True
    """Show the window as a run with --document-mask sees it."""
    packing: Literal["stream", "whole-documents"] = "stream"
    """As in training; conversations are always packed."""
    seed: int = 0
    """Another one shows others."""
    colour: Literal["auto", "always", "never"] = "auto"
    """auto: on a terminal, unless NO_COLOR is set. Without it bars part the tokens, and parentheses hold what is no
    target."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            if any(isinstance(note, Limits) for note in getattr(hint, "__metadata__", ())):
                convert(getattr(self, name), hint, f"--{name.replace('_', '-')}")


def main(args: Sequence[str] | None = None) -> None:
    """Print the corpus."""
    flags = parse_flags(LookFlags, args, prog="python -m minimind.data")
    found = {split: path for split in SPLITS if (path := find_split(flags.folder, split)) is not None}
    readers = {split: ShardReader(path) for split, path in found.items()}
    if flags.split not in readers:
        raise UserError(f"{flags.folder} has no {flags.split} split; it has {', '.join(readers)}")
    reader = readers[flags.split]
    # With its end token: the tokenizer's name does not tell every one.
    manifest = reader.manifest
    tokenizer = load_tokenizer(reader.folder / manifest.tokenizer.file)
    is_terminal = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    painter = TokenPainter(tokenizer, colour=flags.colour == "always" or (flags.colour == "auto" and is_terminal))
    rng = np.random.default_rng(flags.seed)
    dataset = open_dataset(reader, flags.seq_len, flags.document_mask, packed=flags.packing == "whole-documents")
    index = int(rng.integers(len(dataset))) if flags.window is None else flags.window
    if index >= len(dataset):
        raise UserError(f"--window {index}: the last one of {reader.folder} is {len(dataset) - 1}")
    print(describe_totals(readers, tokenizer))
    if sources := describe_sources(reader):
        print(f"\n{sources}")
    print(f"\n{describe_tokens(reader, painter, flags.frequent)}")
    for text in describe_documents(reader, painter, rng, flags.documents, flags.longest):
        print(f"\n{text}")
    print(f"\n{describe_window(dataset, painter, index)}")


if __name__ == "__main__":
    run_main(main)
