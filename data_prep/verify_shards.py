"""Compares every byte of a prepared corpus with its manifests.

    python -m data_prep.verify_shards DIR

Every hash, every token id, every document boundary; changes nothing.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from minimind.cli import parse_flags
from minimind.data.manifest import Manifest, ShardError
from minimind.data.shards import SPLITS, find_split, verify
from minimind.errors import run_main
from minimind.units import format_table


def verify_corpus(folder: Path) -> dict[str, Manifest]:
    """The manifests of the splits found under a corpus folder, or of a shard folder given itself, each verified.

    Raises `ShardError` naming the first damaged file, or the split that another tokenizer made.
    """
    found = {split: path for split in SPLITS if (path := find_split(folder, split)) is not None}
    manifests = {}
    for split, path in found.items():
        total = len(Manifest.load(path).shards)
        with tqdm(total=total, desc=f"verifying {split}", unit="shard", disable=not sys.stderr.isatty()) as bar:
            manifests[split] = verify(path, on_shard=bar.update)
    tokenizers = {manifest.tokenizer.sha256 for manifest in manifests.values()}
    if len(tokenizers) > 1:
        raise ShardError(f"the splits of {folder} were made by different tokenizers: prepare the corpus again")
    return manifests


def format_totals(manifests: dict[str, Manifest]) -> str:
    """A small table: a line for each split."""
    rows: list[tuple[str, ...]] = [("split", "shards", "documents", "tokens", "text bytes", "bytes/token")]
    for split, manifest in manifests.items():
        counts = (len(manifest.shards), manifest.total_documents, manifest.total_tokens, manifest.total_bytes)
        rows.append((split, *(f"{count:,}" for count in counts), f"{manifest.bytes_per_token:.3f}"))
    return format_table(rows, ">")


@dataclass(frozen=True)
class VerifyShardsFlags:
    """Verify a prepared corpus and print its totals."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A corpus folder (with train/ and val/), or one shard folder."""


def main() -> None:
    """Run the command."""
    flags = parse_flags(
        VerifyShardsFlags, sys.argv[1:], default=tyro.MISSING_NONPROP, prog="python -m data_prep.verify_shards"
    )
    print(format_totals(verify_corpus(flags.folder)))
    print(f"{flags.folder}: every hash, token and document is as the manifest says")


if __name__ == "__main__":
    run_main(main)
