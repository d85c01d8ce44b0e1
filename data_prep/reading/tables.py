"""Records of CSV, Parquet and Hugging Face data sets, row by row in constant memory.

Parquet and data sets are read by their libraries. CSV is not: arrow's reader gives no line numbers of bad rows, and one
bad byte costs it a whole block.
"""

import contextlib
import csv
import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.reading.byte_stream import Source
from data_prep.reading.records import (
    CHUNK_BYTES,
    ReadOptions,
    Record,
    Rejected,
    Text,
    find_columns,
)
from data_prep.reading.sources import is_saved_dataset
from minimind.errors import UserError, first_line
from minimind.files import hash_file

# An encoded row can be far smaller than its text (a dictionary page holds a repeated text once), so that no batch may
# have many rows, whatever the file's sizes promise.
_MOST_ROWS = 64
# Bytes of a CSV field, reached by none but one whose quote has no end.
_LARGEST_FIELD = 1 << 28


def read_csv(stream: BinaryIO, source: Source, options: ReadOptions) -> Iterator[Record]:
    """Rows under the number of their first line. Raises `UserError` for a quote that is never closed."""
    csv.field_size_limit(_LARGEST_FIELD)
    # Bytes that are no UTF-8 become lone surrogates, which are found in the one column that counts.
    lines = (line.decode("utf-8", "surrogateescape") for line in iter(lambda: stream.readline(_LARGEST_FIELD), b""))
    reader = csv.reader(lines, strict=True, delimiter="\t" if source.format == "tsv" else ",")
    names: list[str] = []
    while True:
        line = reader.line_num + 1
        text: Text | None = None
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if not names or re.search("unexpected end|field limit", str(error)):
                what = "a quoted field has no end" if names else "the header is broken"
                reason = f"{source.name}:{line}: {what} ({error})"
                raise UserError(f"{reason}; what follows cannot be read: mend the file") from None
            row, text = ["?"], Rejected(f"broken CSV: {error}")
        if not row:
            continue
        if not names:
            names, columns = row, find_columns(row, source.name, options.text_field)
            continue
        if text is None and len(row) != len(names):
            text = Rejected(f"{len(row)} columns, the header has {len(names)}")
        elif text is None:
            text = options.find_text({names[column]: row[column] for column in columns})
        yield line, text


def read_parquet(stream: BinaryIO, source: Source, options: ReadOptions) -> Iterator[Record]:
    """Rows numbered from 1. Raises `UserError` for a damaged file, and for a column absent or not text."""
    # Expensive to load, and needed for this format alone.
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    fields = options.text_field
    try:
        file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=CHUNK_BYTES)
        schema, metadata = file.schema_arrow, file.metadata
        columns = [schema.names[column] for column in find_columns(schema.names, source.name, fields)]
        for column in {*fields}.intersection(columns):
            kind = schema.field(column).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()):
                raise UserError(f"{source.name}: column {column!r} is {kind}, not string: choose with --text-field")
        size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
        batch_size = min(max(CHUNK_BYTES * metadata.num_rows // max(size, 1), 1), _MOST_ROWS)
        number = 0
        for batch in file.iter_batches(batch_size=batch_size, columns=columns, use_threads=False):
            for row in batch.to_pylist():
                number += 1
                yield number, options.find_text(row)
    except UnicodeDecodeError as error:
        raise UserError(f"{source.name} holds text that is no UTF-8: {error}; mend the file") from None
    except pa.ArrowException as error:
        raise UserError(f"{source.name} is not a Parquet file, or it is damaged: {first_line(error)}") from None


def read_dataset(source: Source, options: ReadOptions) -> Iterator[Record]:
    """Rows of one split of a data set, of the hub or a local folder; the splits that are not read are named."""
    with _dataset_errors(source.name):
        rows, others = _load_dataset(source, options)
        if others:
            print(f"note: hf:{source.name}: splits not read: {', '.join(others)}", file=sys.stderr)
        names = rows.column_names
        if names is not None:
            columns = find_columns(names, source.name, options.text_field)
            rows = rows.select_columns([names[column] for column in dict.fromkeys(columns)])
        for number, row in enumerate(rows, start=1):
            yield number, options.find_text(row)


def hash_dataset(name: str, options: ReadOptions) -> str:
    """What stands for a data set's contents: of a folder the sha256 of its files' names and hashes, else its commit."""
    if not os.path.isdir(name):
        return find_commit(name, options.hf_config, options.hf_revision)
    files = sorted(path for path in Path(name).rglob("*") if path.is_file())
    parts = [[str(path.relative_to(name)), hash_file(path)] for path in files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@functools.cache
def find_commit(name: str, config: str | None, revision: str | None) -> str:
    """The commit that the name of a data set on the hub stands for: found once, so that what is read is what is noted,
    whatever is pushed meanwhile."""
    import datasets  # noqa: PLC0415 - expensive to load, and needed for such inputs alone

    with _dataset_errors(name):
        return str(datasets.load_dataset_builder(name, config, revision=revision).hash)


def _load_dataset(source: Source, options: ReadOptions) -> tuple[Any, list[str]]:
    """(rows, names of the other splits)"""
    import datasets  # noqa: PLC0415 - expensive to load, and needed for such inputs alone

    if is_saved_dataset(source.name):
        saved = datasets.load_from_disk(source.name)
        if not isinstance(saved, dict):
            return saved, []
        return saved[options.hf_split], [name for name in saved if name != options.hf_split]
    if options.hf_streaming and "[" in options.hf_split:
        raise UserError(f"--hf-split {options.hf_split}: a slice cannot be streamed: give --no-hf-streaming too")
    name, config = source.name, options.hf_config
    revision = None if os.path.isdir(name) else find_commit(name, config, options.hf_revision)
    rows = datasets.load_dataset(
        name, config, split=options.hf_split, streaming=options.hf_streaming, revision=revision
    )
    splits = datasets.get_dataset_split_names(name, config, revision=revision)
    return rows, [split for split in splits if split != re.split(r"[\[+]", options.hf_split)[0]]


@contextlib.contextmanager
def _dataset_errors(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # it raises whatever its back ends raise
        reason = f"hf:{name}: datasets cannot load it: {first_line(error)}"
        raise UserError(f"{reason}; a file or folder of your own is given without hf:") from error
