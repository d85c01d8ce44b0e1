"""Raw text to token shards on all cores: python -m data_prep.tokenize_corpus.

The same inputs and flags give the same bytes with any number of workers; an interrupted run continues after its last
finished shard.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import shutil
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from data_prep.reading.byte_stream import Source
from data_prep.reading.chunks import cut_source
from data_prep.reading.documents import BadDocuments
from data_prep.reading.records import FRACTION
from data_prep.reading.sources import DATASET, resolve_sources
from data_prep.verify_shards import format_totals
from data_prep.writing.corpus_folder import CorpusFolder
from data_prep.writing.corpus_writer import CorpusWriter
from data_prep.writing.encode_chunk import CorpusOptions, Task, encode_chunk
from data_prep.writing.growing_folder import GrowingFolder
from data_prep.writing.pool import count_workers, map_ordered
from minimind.cache import cache_folder, name_of
from minimind.cli import parse_flags
from minimind.data.manifest import MANIFEST_NAME, Manifest, ShardError
from minimind.data.shards import BAD_DOCUMENTS_NAME, CORPUS_NAME, SPLITS, ShardReader
from minimind.data.tokenizer import Tokenizer, load_tokenizer
from minimind.errors import UserError, run_main
from minimind.files import disk_errors, hash_file
from minimind.remote import exists, join_url, store_folder, url_of

_LISTED_INPUTS = 20


@dataclass(frozen=True, kw_only=True)
class PrepareFlags:
    """Where documents come from and go to."""

    input: tuple[str, ...]
    """Files (.jsonl .ndjson .json .txt .parquet .csv .tsv .warc .wet, also .gz .zst .bz2 .xz), folders, globs, -,
    hf:NAME, or addresses such as s3://bucket/text."""
    output: Path
    """Folder of the corpus: train/ and val/ are made in it."""
    val_input: tuple[str, ...] = ()
    """Inputs of the validation split, which then has these documents alone."""
    workers: int = 0
    """Processes that encode (0: one for each core). The output does not depend on it."""
    max_bad_fraction: Annotated[float, FRACTION] = 0.01
    """Stop if more than this fraction of the documents is bad."""
    overwrite: bool = False
    """Replace another corpus in the output folder, or one begun there with other flags."""
    append: bool = False
    """Add the inputs that are new to the finished corpus in the output folder, as new shards: a part of their own."""


@dataclass(frozen=True, kw_only=True)
class TokenizeCorpusFlags(PrepareFlags, CorpusOptions):
    """Prepare a corpus: token shards of a training and a validation split."""


def main() -> None:
    flags = parse_flags(
        TokenizeCorpusFlags, sys.argv[1:], default=tyro.MISSING_NONPROP, prog="python -m data_prep.tokenize_corpus"
    )
    prepare(flags, CorpusOptions)


def prepare(flags: Any, options_type: type[CorpusOptions]) -> None:
    """Prepare documents of one kind; for a remote output here first, and then copied there.

    Args:
        flags: a `PrepareFlags` that is one of `options_type` too.

    Raises:
        UserError: the flags contradict each other, or an input or the output cannot be used.
    """
    if (url := url_of(flags.output)) is None:
        prepare_here(flags, options_type)
        return
    if flags.append:
        raise UserError(f"--append: {url} is not on this machine, where parts are added; copy it, and store it again")
    here = cache_folder() / "outputs" / name_of(url)
    if not flags.overwrite and exists(join_url(url, CORPUS_NAME)):
        raise UserError(f"--output {url} holds a corpus: choose another folder, or give --overwrite to replace it")
    prepare_here(dataclasses.replace(flags, output=here / "corpus"), options_type)
    store_folder(here / "corpus", url, (MANIFEST_NAME, CORPUS_NAME), here / "stored")
    shutil.rmtree(here)
    print(f"stored in {url}")


def prepare_here(flags: Any, options_type: type[CorpusOptions]) -> None:
    """`prepare` into a folder of this machine."""
    if flags.val_input and flags.val_fraction:
        raise UserError(f"--val-fraction {flags.val_fraction} and --val-input exclude each other: give one of them")
    if flags.val_fraction is None:
        flags = dataclasses.replace(flags, val_fraction=0.0 if flags.val_input else 0.01)
    if flags.append and flags.overwrite:
        raise UserError("--append and --overwrite exclude each other: give one of them")
    workers = count_workers(flags.workers)
    tokenizer = load_tokenizer(flags.tokenizer, flags.eos_token)
    sources = resolve_sources(flags.input, flags.val_input, flags.format)
    if not tokenizer.is_lossless:
        print(
            f"note: {tokenizer.file} changes or drops some characters: texts do not come back exactly", file=sys.stderr
        )
    values = {field.name: getattr(flags, field.name) for field in dataclasses.fields(options_type)}
    options = options_type(**{**values, "tokenizer": tokenizer.file})
    options.check_sources(sources)
    settings = {name: value for name, value in values.items() if name not in ("tokenizer", "eos_token", "hf_streaming")}
    settings |= {"eos_token_id": tokenizer.eos_token_id, "tokenizer_sha256": hash_file(tokenizer.file)}
    settings["text_field"] = list(flags.text_field)  # as JSON gives it back
    if (template := options.template_text(tokenizer)) is not None:
        settings["chat_template_sha256"] = hashlib.sha256(template.encode()).hexdigest()
    fix = "; choose another --output, or make room: the same command continues after the last finished shard"
    with (
        disk_errors(flags.output, fix),
        contextlib.closing(
            GrowingFolder(flags.output, settings, sources, options)
            if flags.append
            else CorpusFolder(flags.output, settings, sources, options, flags.overwrite)
        ) as folder,
    ):
        if folder.is_finished:
            check_files(flags.output)
            print(f"{flags.output} is already prepared from these inputs: nothing to do")
            return
        prepare_corpus(flags, options, tokenizer, folder, workers)
    folders = {split: flags.output / split for split in SPLITS}
    print(format_totals({split: Manifest.load(path) for split, path in folders.items() if path.exists()}))


def check_files(output: Path) -> None:
    """Raise `UserError` for a finished corpus of which a file is gone, or of another size."""
    try:
        for reader in [ShardReader(output / split) for split in SPLITS if (output / split).exists()]:
            hash_file(reader.folder / reader.manifest.tokenizer.file)
    except (ShardError, OSError) as error:
        reason = f"{error.filename} is missing" if isinstance(error, OSError) else error
        raise UserError(f"{reason}; give --overwrite to prepare the corpus again") from None


def prepare_corpus(
    flags: PrepareFlags,
    options: CorpusOptions,
    tokenizer: Tokenizer,
    folder: CorpusFolder,
    workers: int,
) -> None:
    """Encode the sources of `folder` into it. Raises `UserError` for too many bad documents, or none that is good."""
    # One process a core: threads of the library would only get into each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sources = folder.sources
    total = None if any(source.format == DATASET for source in sources) else sum(source.size for source in sources)
    interval = 0.2 if sys.stderr.isatty() else 30.0
    splits = SPLITS if options.val_fraction or flags.val_input else SPLITS[:1]
    written: defaultdict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    forms: Counter[str] = Counter()
    num_empty = 0
    with contextlib.ExitStack() as stack:
        path = folder.partial / BAD_DOCUMENTS_NAME
        log = stack.enter_context(open(path, "w", encoding="utf-8", errors="backslashreplace", newline="\n"))
        bad = BadDocuments(flags.max_bad_fraction, log)
        writer = CorpusWriter(folder, splits, tokenizer, options)
        stack.callback(writer.discard)
        progress = stack.enter_context(tqdm(total=total, unit="B", unit_scale=True, mininterval=interval))
        # Chunks whose documents were written before an interruption are parsed again, to count and compare them.
        tasks = (
            Task(chunk, index >= folder.first_chunks["train"], index >= folder.first_chunks["val"])
            for index, chunk in enumerate(chunk for source in sources for chunk in cut_source(source, options))
        )
        chunks = map_ordered(functools.partial(encode_chunk, options), tasks, workers)
        stack.enter_context(contextlib.closing(chunks))
        for index, chunk in enumerate(chunks):
            folder.begin_input(sources.index(chunk.source))
            bad.add(len(chunk.documents) + len(chunk.problems), chunk.problems)
            written[chunk.source.name] += writer.add_chunk(index, chunk)
            num_empty += chunk.num_empty
            forms += chunk.forms
            progress.update(chunk.progress)
            progress.set_postfix_str(f"{writer.num_documents:,} documents", refresh=False)
            if writer.limit_reached:
                break
        bad.finish()
        totals = writer.finish()
    left_out = {"bad_documents": bad.count, "empty_documents": num_empty, "repeated_documents": writer.num_repeated}
    folder.publish({**left_out, "limit_reached": writer.limit_reached, "splits": totals}, written)
    documents = {name: sum(counts[split, "documents"] for split in SPLITS) for name, counts in written.items()}
    print_counts(sources, documents, left_out)
    if forms:
        print(
            "read from records in the form " + ", ".join(f"{form} ({count:,})" for form, count in forms.most_common())
        )


def print_counts(sources: list[Source], documents: dict[str, int], left_out: dict[str, int]) -> None:
    """How many documents each input gave, and how many were left out."""
    for source in sources[:_LISTED_INPUTS] if len(sources) > 1 else []:
        print(f"{documents.get(source.name, 0):>12,} documents  {source.name}")
    if len(sources) > _LISTED_INPUTS:
        rest = sum(documents.get(source.name, 0) for source in sources[_LISTED_INPUTS:])
        print(f"{rest:>12,} documents  in {len(sources) - _LISTED_INPUTS:,} more inputs (each in corpus.json)")
    bad, empty, repeated = left_out.values()
    print(f"{bad:,} bad, {empty:,} empty and {repeated:,} repeated documents left out")


if __name__ == "__main__":
    run_main(main)
