"""Raw text to token shards on all cores: python -m data_prep.tokenize_corpus.

Reads chunks, has them encoded, writes documents in their order: the same input and flags give the same bytes with any
number of workers, and an interrupted run goes on behind its last finished shard. Knows nothing of file formats.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from tqdm import tqdm

from data_prep.reading.chunks import cut_source
from data_prep.reading.documents import BadDocuments, open_log
from data_prep.reading.records import ReadOptions
from data_prep.reading.sources import DATASET, Source, resolve_sources
from data_prep.verify_shards import format_totals
from data_prep.writing.corpus_folder import BAD_DOCUMENTS_NAME, CorpusFolder
from data_prep.writing.corpus_writer import CorpusWriter
from data_prep.writing.encode_chunk import EncodeOptions, Task, encode_chunk, start_worker
from data_prep.writing.pool import count_workers, map_ordered
from minimind.cli import parse_flags
from minimind.data.manifest import Manifest
from minimind.data.shards import DEFAULT_SHARD_TOKENS, SPLITS, ShardError
from minimind.data.tokenizer import Tokenizer, load_tokenizer
from minimind.errors import UserError, run_main
from minimind.files import hash_file


@dataclass(frozen=True, kw_only=True)
class TokenizeCorpusFlags(ReadOptions):
    """Prepare a corpus: token shards of a training and a validation split."""

    input: tuple[str, ...]
    """Files (.jsonl .json .txt .parquet .csv, also .gz and .zst), globs, folders or data set names (hf:NAME)."""
    tokenizer: Path
    """SentencePiece tokenizer.model, Hugging Face tokenizer.json, or the folder of one."""
    output: Path
    """Folder of the corpus: train/ and val/ are made in it."""
    val_fraction: float = 0.01
    """Fraction of documents for validation, chosen by a hash of their text."""
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


def main() -> None:
    flags = parse_flags(
        TokenizeCorpusFlags, sys.argv[1:], default=tyro.MISSING_NONPROP, prog="python -m data_prep.tokenize_corpus"
    )
    if not 0 <= flags.val_fraction < 1:
        raise UserError(f"--val-fraction {flags.val_fraction} must be at least 0 and below 1")
    tokenizer = load_tokenizer(flags.tokenizer)
    sources = resolve_sources(flags.input)
    settings = describe_settings(flags, tokenizer)
    with disk_errors(flags.output), CorpusFolder(flags.output, settings, sources, flags.overwrite) as folder:
        if folder.is_finished:
            print(f"{flags.output} is already prepared from these inputs: nothing to do")
            return
        prepare_corpus(flags, tokenizer, sources, folder)
    folders = {split: flags.output / split for split in SPLITS}
    print(format_totals({split: Manifest.load(path) for split, path in folders.items() if path.exists()}))


def describe_settings(flags: TokenizeCorpusFlags, tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything but the inputs that decides what is in the corpus."""
    names = ["text_field", "txt_documents", "max_document_bytes", "hf_config", "hf_split", "val_fraction"]
    names += ["dedup", "special_text", "shard_tokens"]
    return {**{name: getattr(flags, name) for name in names}, "tokenizer_sha256": hash_file(tokenizer.file)}


def prepare_corpus(
    flags: TokenizeCorpusFlags, tokenizer: Tokenizer, sources: list[Source], folder: CorpusFolder
) -> None:
    """Encode all sources into `folder`. Raises `UserError` for too many bad documents, or for none that is good."""
    read = ReadOptions(**{name: getattr(flags, name) for name in ReadOptions.__dataclass_fields__})
    options = EncodeOptions(tokenizer.file, read, flags.val_fraction, flags.special_text == "special")
    total = None if any(source.format == DATASET for source in sources) else sum(source.size for source in sources)
    interval = 0.2 if sys.stderr.isatty() else 30.0
    with contextlib.ExitStack() as stack:
        bad = BadDocuments(flags.max_bad_fraction, stack.enter_context(open_log(folder.partial / BAD_DOCUMENTS_NAME)))
        splits = SPLITS if flags.val_fraction > 0 else SPLITS[:1]
        writer = stack.enter_context(CorpusWriter(folder, splits, tokenizer, flags.shard_tokens, flags.dedup))
        progress = stack.enter_context(tqdm(total=total, unit="B", unit_scale=True, mininterval=interval))
        tasks = read_tasks(sources, read, folder.first_chunks)
        chunks = map_ordered(encode_chunk, tasks, count_workers(flags.workers), start_worker, (options,))
        stack.enter_context(contextlib.closing(chunks))
        for index, chunk in enumerate(chunks):
            bad.add(len(chunk.is_val) + len(chunk.problems), chunk.problems)
            writer.add_chunk(index, chunk)
            progress.update(chunk.progress)
            progress.set_postfix_str(f"{writer.num_documents:,} documents", refresh=False)
        bad.finish()
        totals = writer.finish()
    folder.publish({"bad_documents": bad.count, "repeated_documents": writer.num_repeated, "splits": totals})
    print(f"{bad.count:,} bad and {writer.num_repeated:,} repeated documents left out")


def read_tasks(sources: list[Source], options: ReadOptions, first_chunks: dict[str, int]) -> Iterator[Task]:
    """All chunks of all sources. Those that only hold documents written before the interruption are parsed again, to
    count and compare their documents, but not encoded."""
    index = 0
    for source in sources:
        for chunk in cut_source(source, options):
            yield Task(chunk, encode_train=index >= first_chunks["train"], encode_val=index >= first_chunks["val"])
            index += 1


@contextlib.contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    """A full disk or a folder that cannot be written is one line, which says how to go on."""
    try:
        yield
    except OSError as error:
        reason = f"cannot write {error.filename or output}: {error.strerror or error}"
        raise UserError(f"{reason}; what is finished is kept: run the same command again to continue") from None
    except ShardError as error:
        if isinstance(error.__cause__, OSError):
            raise UserError(f"{error}; what is finished is kept: run the same command again to continue") from None
        raise


if __name__ == "__main__":
    run_main(main)
