"""Input files of a corpus, in every format and compression, and what is read from them."""

import bz2
import csv
import gzip
import io
import json
import lzma
from pathlib import Path

import zstandard

from data_prep.reading.documents import BadDocuments, read_documents
from data_prep.reading.records import ReadOptions
from data_prep.reading.sources import resolve_sources

TEXTS = [
    "First document.",
    "第二个文档,有中文。😀",
    'Third, with "quotes", commas\nand lines\r\n\tof several kinds',
    "  leading and trailing blanks  ",
    "\\u00e9 is no escape here, é is",
] * 8


TEXTS = [f"{text} ({i})" for i, text in enumerate(TEXTS)]


COMPRESS = {
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def write(path: Path, texts: list[str]) -> Path:
    """`texts` in the format and compression that the name asks for."""
    name, compressed = path.name, path.suffix in COMPRESS
    name = name.removesuffix(path.suffix) if compressed else name
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
    if name.endswith((".jsonl", ".ndjson")):
        data = "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows)).encode()
    elif name.endswith(".json"):
        data = json.dumps(rows, ensure_ascii=False, indent=1).encode()
    elif name.endswith((".csv", ".tsv")):
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, ["id", "text"], delimiter="\t" if name.endswith(".tsv") else ",")
        writer.writeheader()
        writer.writerows(rows)
        data = buffer.getvalue().encode()
    elif name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=7)
        data = sink.getvalue()
    else:
        data = "\n\n".join(texts).encode()
    path.write_bytes(COMPRESS[path.suffix](data) if compressed else data)
    return path


def read(*paths: object, max_bad: float = 0.0, log: io.StringIO | None = None, **options: object) -> list[str]:
    if isinstance(options.get("text_field"), str):
        options["text_field"] = (options["text_field"],)
    read_options = ReadOptions(**options)  # type: ignore[arg-type]
    sources = resolve_sources([str(path) for path in paths], default_format=read_options.format)
    return list(read_documents(sources, read_options, BadDocuments(max_bad, log)))


def read_bad(path: Path, **options: object) -> tuple[list[str], list[str]]:
    """(documents, problems without the file name)"""
    log = io.StringIO()
    documents = read(path, max_bad=1.0, log=log, **options)
    lines = log.getvalue().splitlines()
    assert all(line.startswith(f"{path}:") for line in lines)
    return documents, [line.removeprefix(f"{path}:") for line in lines]
