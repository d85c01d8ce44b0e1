"""Leaves out of a corpus what is not worth training on: python launch/clean_corpus.py --input DIR --output DIR.

A recipe of datatrove's steps (pip install datatrove orjson spacy): language, the rules of Gopher (arXiv 2112.11446) and
C4 (arXiv 1910.10683), text of test sets, near-duplicates by MinHash. Needs no GPU; nothing of training.
"""

import contextlib
import gzip
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minimind.cli import parse_flags
from minimind.errors import UserError, first_line, run_main
from minimind.files import disk_errors, read_json, write_json
from minimind.host import count_cores
from minimind.schema import AT_LEAST_0, AT_LEAST_1, convert
from minimind.units import format_bytes, format_table

try:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter
    from datatrove.pipeline.dedup import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
        LanguageFilter,
    )
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.hashing import HashConfig, create_hash_func
    from datatrove.utils.text import ngrams, simplify_text
    from datatrove.utils.word_tokenizers import load_word_tokenizer
except ImportError as error:
    MISSING = str(error)
else:
    MISSING = ""

WORK_NAME, LOG_NAME = ".work", "datatrove.log"
RULES = ("language", "gopher-repetition", "gopher-quality", "c4", "contaminated", "near-duplicates")


@dataclass(frozen=True, kw_only=True)
class CleanCorpusFlags:
    """Leave out what is not worth training on; everything left out is kept beside, by the rule that did it."""

    input: Path
    """A .jsonl file (also .gz, .zst), or a folder of them."""
    output: Path
    """Folder to make: kept/, removed/RULE/, report.json. Stopped, the same command continues."""
    text_field: str = "text"
    """The field with the text."""
    language: str = "eng"
    """The language that words and sentences are cut by (ISO 639-3)."""
    languages: tuple[str, ...] = ()
    """Keep only these (ISO 639-1, such as en zh), as fastText's lid.176 finds them (downloaded once)."""
    decontaminate: tuple[Path, ...] = ()
    """.jsonl files of test sets: a document with --ngram words in a row of one of their strings is left out."""
    ngram: Annotated[int, AT_LEAST_1] = 12
    """Words in a row that count as copied from a test set."""
    without: tuple[str, ...] = ()
    """Rules to leave out: language, gopher-repetition, gopher-quality, c4, contaminated, near-duplicates."""
    workers: Annotated[int, AT_LEAST_0] = 0
    """Processes (0: one for each core)."""


def main() -> None:
    flags = parse_flags(
        CleanCorpusFlags, sys.argv[1:], default=tyro.MISSING_NONPROP, prog="python launch/clean_corpus.py"
    )
    if MISSING:
        raise UserError(f"datatrove cannot be used ({MISSING}): pip install datatrove orjson spacy")
    convert(flags.workers, Annotated[int, AT_LEAST_0], "--workers")
    convert(flags.ngram, Annotated[int, AT_LEAST_1], "--ngram")
    if unknown := set(flags.without) - set(RULES):
        raise UserError(f"--without {unknown.pop()}: no such rule; the rules are {', '.join(RULES)}")
    if not flags.input.exists():
        raise UserError(f"--input {flags.input} does not exist: give a .jsonl file or a folder of them")
    with disk_errors(flags.output, "; make room: the same command continues"):
        if not begin(flags):
            print(f"{flags.output} is already clean: nothing to do")
        else:
            clean(flags)
            report = count_removed(flags.output)
            write_json(flags.output / "report.json", report)
            shutil.rmtree(flags.output / WORK_NAME)
    print(format_report(read_json(flags.output / "report.json", "the report")))


def begin(flags: CleanCorpusFlags) -> bool:
    """Whether there is anything to do. Raises `UserError` for an output folder of other flags or inputs."""
    files = sorted(flags.input.rglob("*")) if flags.input.is_dir() else [flags.input]
    inputs = [[str(file), file.stat().st_size] for file in (*files, *flags.decontaminate) if file.is_file()]
    settings = json.loads(json.dumps({**vars(flags), "workers": count_workers(flags), "inputs": inputs}, default=str))
    path = flags.output / "settings.json"
    if path.exists() and read_json(path, "the settings") != settings:
        raise UserError(f"--output {flags.output} was made with other flags or inputs: choose another folder")
    if not path.exists() and flags.output.exists() and any(flags.output.iterdir()):
        raise UserError(f"--output {flags.output} holds other files: choose another folder")
    flags.output.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)
    return not (flags.output / "report.json").exists()


def clean(flags: CleanCorpusFlags) -> None:
    """Run all steps; those that an interrupted run has finished are not done again."""
    work, is_left_out = flags.output / WORK_NAME, flags.without.__contains__
    if flags.decontaminate:
        write_ngrams(flags, work / "ngrams")
    filters: dict[str, Callable[[Any], Any]] = {
        "language": lambda removed: LanguageFilter(list(flags.languages), exclusion_writer=removed),
        "gopher-repetition": lambda removed: GopherRepetitionFilter(exclusion_writer=removed, language=flags.language),
        "gopher-quality": lambda removed: GopherQualityFilter(exclusion_writer=removed, language=flags.language),
        "c4": lambda removed: C4QualityFilter(exclusion_writer=removed, language=flags.language),
        "contaminated": lambda removed: NGramsDecontFilter(
            str(work / "ngrams"), decontamination(flags), removed, flags.language
        ),
    }
    needed = {"language": flags.languages, "contaminated": flags.decontaminate}
    chosen = {rule: make for rule, make in filters.items() if needed.get(rule, True) and not is_left_out(rule)}
    name = None if flags.input.is_dir() else flags.input.name
    folder = flags.input if flags.input.is_dir() else flags.input.parent
    reader = JsonlReader(str(folder), text_key=flags.text_field, glob_pattern=name or "**/*.jsonl*")
    is_last = is_left_out("near-duplicates")
    kept = JsonlWriter(str(flags.output / "kept"))
    steps = [make(removed_writer(flags, rule)) for rule, make in chosen.items()]
    run_stage(flags, "rules", [reader, *steps, kept if is_last else JsonlWriter(str(work / "filtered"))])
    if is_last or not any((work / "filtered").glob("*.jsonl.gz")):
        return  # nothing is left to compare
    config = MinhashConfig(hash_config=HashConfig(hash_fc="sha1"))
    signatures, buckets, clusters = (str(work / name) for name in ("signatures", "buckets", "clusters"))
    again = JsonlReader(str(work / "filtered"))
    sign = MinhashDedupSignature(signatures, config, language=flags.language)
    run_stage(flags, "signatures", [again, sign])
    compare = MinhashDedupBuckets(signatures, buckets, config=config)
    run_stage(flags, "buckets", [compare], tasks=config.num_buckets)
    run_stage(flags, "clusters", [MinhashDedupCluster(buckets, clusters, config)], tasks=1)
    leave_out = MinhashDedupFilter(clusters, removed_writer(flags, "near-duplicates"))
    run_stage(flags, "near-duplicates", [again, leave_out, kept])


def decontamination(flags: CleanCorpusFlags) -> Any:
    """How n-grams are made. By sha1, here and for MinHash: datatrove's default depends on what else is installed."""
    return NGramsDecontConfig(n_grams=flags.ngram, hash_config=HashConfig(hash_fc="sha1"))


def removed_writer(flags: CleanCorpusFlags, rule: str) -> Any:
    """Writes what a rule leaves out."""
    return JsonlWriter(str(flags.output / "removed" / rule))


def run_stage(flags: CleanCorpusFlags, name: str, pipeline: list[Any], tasks: int = 0) -> None:
    """Run one pipeline. Raises `UserError` with the first line of what went wrong; datatrove's own words are in a
    file."""
    print(f"{name} ...", flush=True)
    work, workers = flags.output / WORK_NAME, count_workers(flags)
    tasks = tasks or workers
    executor = LocalPipelineExecutor(pipeline, tasks, min(workers, tasks), logging_dir=str(work / "logs" / name))
    work.mkdir(exist_ok=True)
    log = work / LOG_NAME
    try:
        with written_to(log):
            executor.run()
    except Exception as error:  # whatever a step raises, of many libraries
        raise UserError(f"{name}: {type(error).__name__}: {first_line(error)}; more is in {log}") from error


@contextlib.contextmanager
def written_to(log: Path) -> Iterator[None]:
    """Let what this process and its workers write to standard error go into a file."""
    sys.stderr.flush()
    before = os.dup(2)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)


def count_workers(flags: CleanCorpusFlags) -> int:
    """Processes, of which each has its own output file: an interrupted run goes on with as many."""
    return flags.workers or count_cores()


def write_ngrams(flags: CleanCorpusFlags, folder: Path) -> None:
    """The hashes of the test sets' n-grams, as datatrove's filter reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    config = decontamination(flags)
    hash_text, words = create_hash_func(config.hash_config), load_word_tokenizer(flags.language)
    for path in flags.decontaminate:
        hashes: set[int] = set()
        for record in read_records(path):
            for text in strings_of(record):
                tokens = words.word_tokenize(simplify_text(text, config.norm_config))
                hashes.update(hash_text(" ".join(gram)) for gram in ngrams(tokens, config.n_grams))
        if not hashes:
            raise UserError(f"--decontaminate {path}: no string in it has {flags.ngram} words; lower --ngram")
        np.array(sorted(hashes), config.hash_config.np_descr).tofile(folder / f"{path.stem}.index.hashes")


def read_records(path: Path) -> Iterator[Any]:
    """The records of a .jsonl file, also gzipped. Raises `UserError` naming the line that is none."""
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):  # noqa: B007 - for the error
                yield json.loads(line)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path}:{number}: broken JSON: {first_line(error)}") from None


def strings_of(value: Any) -> Iterator[str]:
    """Every string in a parsed JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings_of(inner)


def count_removed(output: Path) -> dict[str, Any]:
    """Documents and bytes of text that were kept, and that each rule removed, with its reasons."""

    def count(folder: Path) -> dict[str, Any]:
        reasons: Counter[str] = Counter()
        documents = num_bytes = 0
        for path in sorted(folder.glob("*.jsonl.gz")):
            for record in read_records(path):
                documents, num_bytes = documents + 1, num_bytes + len(record["text"].encode())
                if reason := record.get("metadata", {}).get("filter_reason"):
                    reasons[reason] += 1
        return {"documents": documents, "bytes": num_bytes, "reasons": dict(reasons.most_common())}

    removed = {rule: count(output / "removed" / rule) for rule in RULES if (output / "removed" / rule).exists()}
    return {"kept": count(output / "kept"), "removed": removed, "lines": count_lines(output)}


def count_lines(output: Path) -> dict[str, int]:
    """Lines that C4's rules took out of documents, by the rule."""
    found: Counter[str] = Counter()
    for path in (output / WORK_NAME / "logs" / "rules" / "stats").glob("*.json"):
        for step in json.loads(path.read_text(encoding="utf-8")):
            for name, value in step["stats"].items():
                if name.startswith("line-filter-"):
                    found[name.removeprefix("line-filter-")] += value["total"] if isinstance(value, dict) else value
    return dict(found.most_common())


def format_report(report: dict[str, Any]) -> str:
    """A line for each rule, and what it names as reasons."""
    parts = {**report["removed"], "kept": report["kept"]}
    total = max(1, sum(part["documents"] for part in parts.values()))
    rows = [("documents", "", "text", "", "reasons")]
    for name, part in parts.items():
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in part["reasons"].items())
        share = f"{part['documents'] / total:.1%}"
        rows.append((f"{part['documents']:,}", share, format_bytes(part["bytes"]), name, reasons))
    lines = ", ".join(f"{reason} {count:,}" for reason, count in report["lines"].items())
    return format_table(rows, ">>><") + (f"\nlines taken out by C4's rules: {lines}" if lines else "")


if __name__ == "__main__":
    run_main(main)
