"""Raw text to token shards on all cores: python -m data_prep.tokenize_corpus.

The same inputs and flags give the same bytes with any number of workers; an interrupted run continues after its last
finished shard.
"""

import contextlib
import dataclasses
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from tqdm import tqdm

from data_prep.reading.byte_stream import Source
from data_prep.reading.chunks import cut_source
from data_prep.reading.documents import BadDocuments, open_log
from data_prep.reading.records import ReadOptions, check_range
from data_prep.reading.sources import DATASET, resolve_sources
from data_prep.verify_shards import format_totals
from data_prep.writing.corpus_folder import BAD_DOCUMENTS_NAME, CorpusFolder
from data_prep.writing.corpus_writer import CorpusWriter, Limits
from data_prep.writing.encode_chunk import EncodeOptions, Task, encode_chunk, start_worker
from data_prep.writing.pool import count_workers, map_ordered
from minimind.cli import parse_flags
from minimind.data.manifest import Manifest
from minimind.data.shards import DEFAULT_SHARD_TOKENS, SPLITS, ShardError
from minimind.data.tokenizer import Tokenizer, load_tokenizer
from minimind.errors import UserError, run_main
from minimind.files import hash_file

_LISTED_INPUTS = 20


@dataclass(frozen=True, kw_only=True)
class TokenizeCorpusFlags(ReadOptions):
    """Prepare a corpus: token shards of a training and a validation split."""

    input: tuple[str, ...]
    """Files (.jsonl .ndjson .json .txt .parquet .csv .tsv, also .gz .zst .bz2 .xz), folders, globs, - or hf:NAME."""
    tokenizer: Path
    """SentencePiece tokenizer.model, Hugging Face tokenizer.json, or the folder of one."""
    output: Path
    """Folder of the corpus: train/ and val/ are made in it."""
    val_input: tuple[str, ...] = ()
    """Inputs of the validation split, which then has these documents alone."""
    val_fraction: float | None = None
    """Fraction of documents for validation, chosen by a hash of their text (0.01 without --val-input)."""
    eos_token: str | None = None
    """Special token that ends each document (found by its name in the tokenizer)."""
    max_documents: int | None = None
    """Stop after so many documents, from the beginning of the inputs, validation included."""
    max_tokens: int | None = None
    """Stop after so many tokens."""
    max_bytes: int | None = None
    """Stop after so many bytes of text."""
    dedup: bool = False
    """Drop documents whose text came before (16 bytes of memory for each document, 32 at moments)."""
    special_text: Literal["special", "plain"] = "special"
    """A special token's text inside a document, such as <|im_end|>: becomes that token, or plain text."""
    shard_tokens: int = DEFAULT_SHARD_TOKENS
    """Tokens in a shard."""
    workers: int = 0
    """Processes that encode (0: one for each core). The output does not depend on it."""
    max_bad_fraction: float = 0.01
    """Stop if more than this fraction of the documents is bad."""
    overwrite: bool = False
    """Replace another corpus in the output folder, or one begun there with other flags."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.val_input and self.val_fraction:
            raise UserError(f"--val-fraction {self.val_fraction} and --val-input exclude each other: give one of them")
        if self.val_fraction is not None and not 0 <= self.val_fraction < 1:
            raise UserError(f"--val-fraction {self.val_fraction}: must be at least 0 and below 1")
        check_range("--max-bad-fraction", self.max_bad_fraction, 0, 1)
        for name in ("max_documents", "max_tokens", "max_bytes", "shard_tokens"):
            check_range(f"--{name.replace('_', '-')}", getattr(self, name), 1)


def main() -> None:
    flags = parse_flags(
        TokenizeCorpusFlags, sys.argv[1:], default=tyro.MISSING_NONPROP, prog="python -m data_prep.tokenize_corpus"
    )
    if flags.val_fraction is None:
        flags = dataclasses.replace(flags, val_fraction=0.0 if flags.val_input else 0.01)
    workers = count_workers(flags.workers)
    tokenizer = load_tokenizer(flags.tokenizer, flags.eos_token)
    sources = resolve_sources(flags.input, flags.val_input, flags.format)
    if not tokenizer.is_lossless:
        print(
            f"note: {tokenizer.file} changes or drops some characters: texts do not come back exactly", file=sys.stderr
        )
    settings = describe_settings(flags, tokenizer)
    read = ReadOptions(**{name: getattr(flags, name) for name in ReadOptions.__dataclass_fields__})
    with disk_errors(flags.output), CorpusFolder(flags.output, settings, sources, read, flags.overwrite) as folder:
        if folder.is_finished:
            print(f"{flags.output} is already prepared from these inputs: nothing to do")
            return
        options = EncodeOptions(
            tokenizer.file, flags.eos_token, read, flags.val_fraction or 0, flags.special_text == "special"
        )
        prepare_corpus(flags, options, tokenizer, sources, folder, workers)
    folders = {split: flags.output / split for split in SPLITS}
    print(format_totals({split: Manifest.load(path) for split, path in folders.items() if path.exists()}))


def describe_settings(flags: TokenizeCorpusFlags, tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything but the inputs that decides what is in the corpus."""
    names = [name for name in ReadOptions.__dataclass_fields__ if name != "hf_streaming"]
    names += ["val_fraction", "max_documents", "max_tokens", "max_bytes", "dedup", "special_text", "shard_tokens"]
    settings = {**{name: getattr(flags, name) for name in names}, "text_field": list(flags.text_field)}
    return {**settings, "eos_token_id": tokenizer.eos_token_id, "tokenizer_sha256": hash_file(tokenizer.file)}


def prepare_corpus(
    flags: TokenizeCorpusFlags,
    options: EncodeOptions,
    tokenizer: Tokenizer,
    sources: list[Source],
    folder: CorpusFolder,
    workers: int,
) -> None:
    """Encode all sources into `folder`. Raises `UserError` for too many bad documents, or for none that is good."""
    total = None if any(source.format == DATASET for source in sources) else sum(source.size for source in sources)
    interval = 0.2 if sys.stderr.isatty() else 30.0
    limits = Limits(flags.max_documents, flags.max_tokens, flags.max_bytes)
    splits = SPLITS if flags.val_fraction or flags.val_input else SPLITS[:1]
    documents: Counter[str] = Counter()
    num_empty = 0
    with contextlib.ExitStack() as stack:
        bad = BadDocuments(flags.max_bad_fraction, stack.enter_context(open_log(folder.partial / BAD_DOCUMENTS_NAME)))
        writer = CorpusWriter(folder, splits, tokenizer, flags.shard_tokens, flags.dedup, limits)
        stack.enter_context(writer)
        progress = stack.enter_context(tqdm(total=total, unit="B", unit_scale=True, mininterval=interval))
        tasks = read_tasks(sources, options.read, folder.first_chunks)
        chunks = map_ordered(encode_chunk, tasks, workers, start_worker, (options,))
        stack.enter_context(contextlib.closing(chunks))
        numbers = {source: number for number, source in enumerate(sources)}
        for index, chunk in enumerate(chunks):
            folder.begin_input(numbers[chunk.source])
            bad.add(len(chunk.is_val) + len(chunk.problems), chunk.problems)
            documents[chunk.source.name] += writer.add_chunk(index, chunk)
            num_empty += chunk.num_empty
            progress.update(chunk.progress)
            progress.set_postfix_str(f"{writer.num_documents:,} documents", refresh=False)
            if writer.limit_reached:
                break
        bad.finish()
        totals = writer.finish()
    left_out = {"bad_documents": bad.count, "empty_documents": num_empty, "repeated_documents": writer.num_repeated}
    folder.publish({**left_out, "limit_reached": writer.limit_reached, "splits": totals}, documents)
    print_counts(sources, documents, left_out)


def print_counts(sources: list[Source], documents: Counter[str], left_out: dict[str, int]) -> None:
    """How many documents each input gave, and how many were left out."""
    for source in sources[:_LISTED_INPUTS] if len(sources) > 1 else []:
        print(f"{documents[source.name]:>12,} documents  {source.name}")
    if len(sources) > _LISTED_INPUTS:
        rest = sum(documents[source.name] for source in sources[_LISTED_INPUTS:])
        print(f"{rest:>12,} documents  in {len(sources) - _LISTED_INPUTS:,} more inputs (each in corpus.json)")
    bad, empty, repeated = left_out.values()
    print(f"{bad:,} bad, {empty:,} empty and {repeated:,} repeated documents left out")


def read_tasks(sources: list[Source], options: ReadOptions, first_chunks: dict[str, int]) -> Iterator[Task]:
    """All chunks of all sources. Those that only hold documents written before the interruption are parsed again, to
    count and compare their documents, but not encoded."""
    first = dict(first_chunks)  # they move on while this runs
    chunks = (chunk for source in sources for chunk in cut_source(source, options))
    for index, chunk in zip(itertools.count(), chunks, strict=False):
        yield Task(chunk, encode_train=index >= first["train"], encode_val=index >= first["val"])


@contextlib.contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    """A full disk or a folder that cannot be written is one line, which says how to go on if anything is kept."""
    try:
        yield
    except (OSError, ShardError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        reason = f"cannot write {cause.filename or output}: {cause.strerror or cause}"
        kept = "; what is finished is kept: run the same command again to continue"
        fix = kept if any(output.glob(".partial/*/shard_*.npy")) else "; choose another --output"
        raise UserError(reason + fix) from None


if __name__ == "__main__":
    run_main(main)
