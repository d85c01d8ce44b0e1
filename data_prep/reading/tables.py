"""Records out of tables: CSV, Parquet, and whatever Hugging Face `datasets` loads, row by row in constant memory.

A row that cannot be used is a record too, with the reason. Knows nothing of chunks or processes.
"""

import contextlib
import csv
import shutil
import tempfile
from collections.abc import Iterator
from typing import BinaryIO, Protocol

from data_prep.reading.records import (
    CHUNK_BYTES,
    ReadOptions,
    Record,
    Rejected,
    Text,
    find_column,
    find_text,
    reject_long,
)
from data_prep.reading.sources import Source
from minimind.errors import UserError, first_line


class LineStream(Protocol):
    """Bytes line by line."""

    def readline(self, size: int) -> bytes: ...


class _CsvLines:
    """Lines for `csv.reader`; an empty one stands for a line beyond `limit`, and `dropped` is set."""

    def __init__(self, stream: LineStream, limit: int) -> None:
        self._stream = stream
        self._limit = limit
        self.count = 0
        self.dropped = False

    def __iter__(self) -> "_CsvLines":
        return self

    def __next__(self) -> str:
        line = self._stream.readline(self._limit + 1)
        if not line:
            raise StopIteration
        self.count += 1
        if len(line) > self._limit:
            self.dropped = True
            while not line.endswith(b"\n") and (line := self._stream.readline(CHUNK_BYTES)):
                pass
            return "\n"
        # Bytes that are no UTF-8 become lone surrogates, which are found in the one column that counts.
        return line.decode("utf-8", "surrogateescape")


def read_csv(stream: LineStream, source: Source, options: ReadOptions) -> Iterator[Record]:
    lines = _CsvLines(stream, options.max_document_bytes)
    csv.field_size_limit(options.max_document_bytes)
    reader = csv.reader(lines, strict=True)
    column, width = -1, 0
    while True:
        line, lines.dropped = lines.count + 1, False
        text: Text
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            row, text = ["?"], Rejected(f"broken CSV: {error}")
        else:
            if column < 0 and row:
                column, width = find_column(row, source.name, options.text_field), len(row)
                continue
            text = row[column] if len(row) == width else Rejected(f"{len(row)} columns, the header has {width}")
        if lines.dropped:
            text = reject_long(options.max_document_bytes)
        elif not row:
            continue
        yield line, text, len(text)


class ParquetTable:
    """The text column of a Parquet file. Raises `UserError` for a damaged file, and for a column absent or not text."""

    def __init__(self, stream: BinaryIO, source: Source, options: ReadOptions) -> None:
        # Expensive to load, and needed for this format alone.
        import pyarrow as pa  # noqa: PLC0415
        import pyarrow.parquet as pq  # noqa: PLC0415

        self._name = source.name
        self._field = options.text_field
        self._error = pa.ArrowException
        self._binary = pa.large_binary()
        with self._errors():
            self._file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=CHUNK_BYTES)
            column = find_column(self._file.schema_arrow.names, self._name, self._field)
            kind = self._file.schema_arrow.types[column]
            self._is_dictionary = pa.types.is_dictionary(kind)
            kind = kind.value_type if self._is_dictionary else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()):
            raise UserError(f"{self._name}: column {self._field!r} is {kind}, not string")
        self.num_rows: int = self._file.metadata.num_rows

    def read_rows(self) -> Iterator[Record]:
        """Texts as bytes, numbered from 1."""
        metadata = self._file.metadata
        size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
        batch_size = min(max(CHUNK_BYTES * self.num_rows // max(size, 1), 1), 4096)
        row = 0
        with self._errors():
            for batch in self._file.iter_batches(batch_size=batch_size, columns=[self._field], use_threads=False):
                values = batch.column(0).dictionary_decode() if self._is_dictionary else batch.column(0)
                for text in values.cast(self._binary).to_pylist():
                    row += 1
                    yield row, Rejected(f"column {self._field!r} is null") if text is None else text, len(text or b"")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self._error as error:
            reason = first_line(error)
            raise UserError(f"{self._name} is not a Parquet file, or it is damaged: {reason}") from None


def spool(stream: BinaryIO) -> BinaryIO:
    """The bytes of `stream` in a temporary file without a name: a table whose index stands at the end needs that."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    shutil.copyfileobj(stream, file, CHUNK_BYTES)
    file.seek(0)
    return file


def read_dataset(source: Source, options: ReadOptions) -> Iterator[Record]:
    # Expensive to load, and needed for such inputs alone.
    import datasets  # noqa: PLC0415

    try:
        rows = datasets.load_dataset(
            source.name, options.hf_config, split=options.hf_split, streaming=options.hf_streaming
        )
        if rows.column_names is not None:
            find_column(rows.column_names, source.name, options.text_field)
            rows = rows.select_columns([options.text_field])
        for number, row in enumerate(rows, start=1):
            text = find_text(row, options.text_field)
            yield number, text, len(text)
    except UserError:
        raise
    except Exception as error:  # it raises whatever its back ends raise
        reason = first_line(error)
        raise UserError(f"{source.name} is no local file, and datasets cannot load it: {reason}") from error
