"""Tokens that another program prepared into shards, and shards into its files: python -m data_prep.convert_shards.

    python -m data_prep.convert_shards --input NAME.bin --tokenizer DIR --output DIR
    python -m data_prep.convert_shards --to megatron|nanoset --input DIR --output DIR

Both ways are exact: documents and tokens come back as they were.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from tqdm import tqdm

from data_prep.converting.foreign_file import ForeignTokens
from data_prep.converting.megatron import open_megatron, write_megatron
from data_prep.converting.nanoset import open_nanoset, write_nanoset
from data_prep.verify_shards import format_totals
from minimind.cli import parse_flags
from minimind.data.manifest import Manifest
from minimind.data.shard_writer import DEFAULT_SHARD_TOKENS, ShardWriter
from minimind.data.shards import SPLITS, ShardReader, find_split
from minimind.data.tokenizer import Tokenizer, load_tokenizer
from minimind.errors import UserError, run_main
from minimind.files import disk_errors, new_folder, replace_file
from minimind.schema import AT_LEAST_1, convert

_SUFFIXES: dict[str, Callable[[Path], ForeignTokens]] = {
    ".bin": lambda path: open_megatron(path.with_suffix("")),
    ".ds": open_nanoset,
}


@dataclass(frozen=True, kw_only=True)
class ConvertShardsFlags:
    """Convert token files of Megatron, gpt-neox (.bin, .idx) and nanotron (.ds) into shards, and shards into them."""

    input: tuple[Path, ...]
    """.bin or .ds files, or folders of them; with --to a corpus folder."""
    output: Path
    """The folder to make: a corpus folder, or one of the other program's files for each split."""
    to: Literal["shards", "megatron", "nanoset"] = "shards"
    """What to write."""
    val_input: tuple[Path, ...] = ()
    """Token files of the validation split."""
    tokenizer: Path | None = None
    """What made the tokens: tokenizer.model, tokenizer.json, or the folder of one. For shards."""
    eos_token: str | None = None
    """Special token that ends each document (found by its name in the tokenizer)."""
    add_end_tokens: bool = False
    """Give documents that do not end with that token one; without, they are an error."""
    shard_tokens: Annotated[int, AT_LEAST_1] = DEFAULT_SHARD_TOKENS
    """Tokens in a shard."""
    overwrite: bool = False
    """Replace the output folder if it exists."""


def main() -> None:
    flags = parse_flags(
        ConvertShardsFlags, sys.argv[1:], default=tyro.MISSING_NONPROP, prog="python -m data_prep.convert_shards"
    )
    convert(flags.shard_tokens, Annotated[int, AT_LEAST_1], "--shard-tokens")
    if flags.output.exists() and not flags.overwrite:
        raise UserError(f"--output {flags.output} exists: give another name, or --overwrite to replace it")
    fix = "; choose another --output, or make room"
    with disk_errors(flags.output, fix), new_folder(flags.output) as partial:
        (export if flags.to != "shards" else gather)(flags, partial)
    if flags.to == "shards":
        folders = {split: flags.output / split for split in SPLITS}
        print(format_totals({split: Manifest.load(path) for split, path in folders.items() if path.exists()}))
    else:
        print(f"{flags.output}: {', '.join(sorted(path.name for path in flags.output.iterdir()))}")


def export(flags: ConvertShardsFlags, folder: Path) -> None:
    """Shards into the files of another program, in `folder`."""
    if len(flags.input) != 1 or flags.val_input:
        raise UserError(f"--to {flags.to}: give one corpus folder by --input")
    source = flags.input[0]
    for split in SPLITS:
        if (found := find_split(source, split)) is None:
            continue
        reader = ShardReader(found)
        if reader.manifest.is_chat:
            raise UserError(f"{found} holds conversations, and files of {flags.to} do not say which tokens are trained")
        if flags.to == "megatron":
            write_megatron(reader, folder / split)
        else:
            write_nanoset(reader, folder / split)
        file = found / reader.manifest.tokenizer.file
        replace_file(folder / file.name, file.read_bytes())


def gather(flags: ConvertShardsFlags, folder: Path) -> None:
    """Token files into a corpus folder."""
    if flags.tokenizer is None:
        raise UserError("--tokenizer: not given; shards hold the tokenizer that made them")
    tokenizer = load_tokenizer(flags.tokenizer, flags.eos_token)
    # UTF-8 bytes of each token: what a loss by the byte is divided by.
    num_bytes = np.array([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)])
    for split, inputs in {"train": flags.input, "val": flags.val_input}.items():
        files = [_SUFFIXES[path.suffix](path) for path in find_token_files(inputs)]
        if not files:
            continue
        total = sum(len(file.tokens) for file in files)
        bar = tqdm(total=total, desc=split, unit="token", unit_scale=True, disable=not sys.stderr.isatty())
        with bar, write_split(folder / split, tokenizer, flags.shard_tokens) as writer:
            num_empty = 0
            for document in iterate_documents(files, tokenizer, add_ends=flags.add_end_tokens):
                bar.update(len(document) + 1)
                if not len(document):
                    num_empty += 1
                    continue
                # A token outside the vocabulary is the writer's to refuse.
                writer.add_document(document, int(np.take(num_bytes, document, mode="clip").sum()))
            if not writer.num_documents:
                raise UserError(f"{files[0].name}: holds no document")
        if num_empty:
            print(f"{split}: {num_empty:,} empty documents left out")


def find_token_files(inputs: tuple[Path, ...]) -> list[Path]:
    """The .bin and .ds files that the words after --input stand for, in order. Raises `UserError` if one is none."""
    found: list[Path] = []
    for path in inputs:
        if path.suffix == ".idx" or (not path.suffix and path.with_name(path.name + ".idx").exists()):
            path = path.with_suffix(".bin")
        files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES) if path.is_dir() else [path]
        if not files or files[0].suffix not in _SUFFIXES:
            raise UserError(f"--input {path} is no .bin or .ds file and no folder of them; for shards give --to")
        found += files
    return found


@contextlib.contextmanager
def write_split(folder: Path, tokenizer: Tokenizer, shard_tokens: int) -> Iterator[ShardWriter]:
    """The writer of one shard folder, finished when the block ends."""
    with ShardWriter(
        folder,
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        tokenizer_file=tokenizer.file,
        shard_tokens=shard_tokens,
    ) as writer:
        yield writer


def iterate_documents(files: list[ForeignTokens], tokenizer: Tokenizer, *, add_ends: bool) -> Iterator[np.ndarray]:
    """The tokens of each document without its end token, (n,) integer. Raises `UserError` for one that has none, unless
    one is to be added."""
    for file in files:
        for number, (start, end) in enumerate(zip(np.append(0, file.ends[:-1]), file.ends, strict=True)):
            document = file.tokens[start:end]
            if len(document) and int(document[-1]) == tokenizer.eos_token_id:
                yield document[:-1]
            elif len(document) and not add_ends:
                name = tokenizer.decode([tokenizer.eos_token_id])
                raise UserError(
                    f"{file.name}: document {number} does not end with {name} ({tokenizer.eos_token_id}): choose it by "
                    "--eos-token, or give --add-end-tokens to have one added"
                )
            else:
                yield document


if __name__ == "__main__":
    run_main(main)
