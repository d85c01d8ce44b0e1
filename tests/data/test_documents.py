"""Readers: every format gives the same documents, chunks never change them, each bad input is one line."""

import bz2
import csv
import errno
import gzip
import io
import json
import lzma
import os
import random
import tempfile
import threading
import types
from pathlib import Path

import pytest
import zstandard

import data_prep.reading.chunks
import data_prep.reading.tables
from data_prep.reading.documents import BadDocuments, read_documents
from data_prep.reading.records import ReadOptions
from data_prep.reading.sources import resolve_sources
from data_prep.reading.tables import find_commit
from data_prep.writing.corpus_folder import CorpusFolder
from minimind.errors import UserError

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


@pytest.mark.parametrize("compression", ["", *COMPRESS])
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_documents(tmp_path: Path, suffix: str, compression: str) -> None:
    assert read(write(tmp_path / f"a{suffix}{compression}", TEXTS)) == TEXTS


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_what_a_document_is_in_a_txt_file(tmp_path: Path, compression: str) -> None:
    paragraphs = ["one\ntwo", "  three\n\tfour", "五"]
    path = write(tmp_path / f"a.txt{compression}", paragraphs)
    assert read(path) == paragraphs
    assert read(path, txt_documents="line") == ["one", "two", "  three", "\tfour", "五"]
    assert read(path, txt_documents="document") == ["\n\n".join(paragraphs)]


def test_blank_lines_separate_paragraphs_whatever_is_in_them(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf\n \n one\r\ntwo\r\n\r\n\r\nthree\n \t \nfour\n\n\n")
    assert read(path) == [" one\ntwo", "three", "four"]
    # Ideographic and no-break spaces, as Chinese text has them.
    path.write_text("第一行\n　　\n\u00a0第二行\n \u2003\u00a0　\n\n第三行", encoding="utf-8")
    assert read(path) == ["第一行", "\u00a0第二行", "第三行"]
    assert read(path, txt_documents="line") == ["第一行", "\u00a0第二行", "第三行"]


def test_lines_end_the_same_way_whoever_wrote_them(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n\r\nthree\r\n")
    (tmp_path / "b.txt").write_bytes(b"one\ntwo\n\nthree\n")
    for mode in ("line", "paragraph", "document"):
        documents = read(tmp_path / "a.txt", txt_documents=mode)
        assert documents == read(tmp_path / "b.txt", txt_documents=mode) and not any("\r" in text for text in documents)


@pytest.mark.parametrize("kind", ["line", "paragraph", "document", "jsonl", "json", "csv"])
def test_chunks_and_blocks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    rng = random.Random(kind)
    suffix = "txt" if kind in ("line", "paragraph", "document") else kind
    options = {"max_document_bytes": 60 if suffix in ("txt", "jsonl") else 1000} | (
        {"txt_documents": kind} if suffix == "txt" else {}
    )
    path = tmp_path / f"a.{suffix}"
    found: list[str] = []
    for _ in range(12):
        if suffix in ("txt", "jsonl"):
            lines = [
                rng.choice(
                    [
                        "",
                        " ",
                        "\t\r",
                        "ab",
                        "你" * 5,
                        "x" * 60,
                        "x" * 61,
                        "x" * 60 + "\r",
                        "y" * 200,
                        " " * 70 + "\f",
                        '{"text": "z"}',
                    ]
                )
                for _ in range(40)
            ]
            path.write_bytes("\n".join(lines).encode())
        else:
            write(path, ["".join(rng.choices('ab,"\n你\\ ', k=rng.randrange(1, 9))) + "." for _ in range(30)])
        results = []
        for size in (1, 2, 3, 7, 64, 1000, 1 << 19):
            monkeypatch.setattr(data_prep.reading.chunks, "CHUNK_BYTES", size)
            monkeypatch.setattr(data_prep.reading.tables, "CHUNK_BYTES", size)
            results.append(read_bad(path, **options))
        assert all(result == results[0] for result in results[1:])
        found += results[0][0]
    assert found or kind == "document"


def test_several_frames_and_members_are_one_stream(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(map(compress, lines)))
    (tmp_path / "b.jsonl.gz").write_bytes(b"".join(map(gzip.compress, lines)))
    assert read(tmp_path / "a.jsonl.zst", tmp_path / "b.jsonl.gz") == TEXTS * 2


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl.bz2", "a.jsonl.xz", "a.parquet", "a.parquet.gz", "a.json"]
)
def test_file_that_was_cut_short_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [text * 500 for text in TEXTS])
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(UserError, match=name) as caught:
        read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl.bz2", "a.jsonl.xz", "a.parquet"])
def test_file_that_is_not_what_its_name_says_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=rf"{name}.*(damaged)"):
        read(tmp_path / name)
    (tmp_path / name).write_bytes(b"plain text, nothing else\n" * 10)
    with pytest.raises(UserError, match=rf"{name}.*(damaged)"):
        read(tmp_path / name)


def test_bad_jsonl_lines_are_named_and_the_others_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"text": "good 1"}',
        b'{"text": "invalid \xff utf-8"}',
        b'{"text": "broken',
        b"",
        b'{"body": 1, "title": "missing field"}',
        b'{"text": ""}',
        b'{"text": " \\n\\t "}',
        b'{"text": null}',
        b'{"text": ["a", "list"]}',
        b'"a string"',
        b'{"text": "nul \\u0000 escaped"}',
        b'{"text": "raw nul \0"}',
        b'{"text": "lone \\ud800 surrogate"}',
        b'{"text": "' + b"x" * 5000 + b'"}',
        b"[" * 4000,
        b'{"text": "good 2", "n": ' + b"9" * 3000 + b"}",
        b'{"text": "\\ud83d\\ude00 good 3"}\r',
    ]
    path.write_bytes(b"\n".join(lines))
    documents, problems = read_bad(path, max_document_bytes=4096)
    assert documents == ["good 1", "good 2", "😀 good 3"]
    expected = {
        2: "invalid UTF-8: byte 0xff at column 19",
        3: "broken JSON: Unterminated string",
        5: "no field 'text' (it has 'body', 'title')",
        8: "field 'text' is null",
        9: "field 'text' is a list",
        10: "a string, not an object",
        11: "NUL character",
        12: "broken JSON: Invalid control character",
        13: "lone surrogate",
        14: "longer than --max-document-bytes 4,096",
        15: "broken JSON",
    }
    assert len(problems) == len(expected)
    for problem, (line, reason) in zip(problems, expected.items(), strict=True):
        assert problem.startswith(f"{line}: ") and reason in problem


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json", "a.csv", "a.jsonl.gz"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bytes(range(256)) * 100, "binary data, not text"),
        (gzip.compress(b'{"text": "a"}'), r"no text but \.gz data: add \.gz to its name"),
        ("one text\n".encode("utf-16-le"), "looks like UTF-16: give --encoding utf-16-le"),
        ("one text\n".encode("utf-16-be"), "looks like UTF-16: give --encoding utf-16-be"),
        ('{"text": "今天天气很好，我们去公园散步"}\n'.encode("gbk"), "looks like gb18030: give --encoding gb18030"),
        ("été, déjà, français, élève, goût, là, où, très".encode("cp1252"), "looks like cp1252"),
    ],
    ids=["binary", "gzip", "utf-16-le", "utf-16-be", "gb18030", "cp1252"],
)
def test_a_file_that_cannot_be_read_stops_the_run(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    # Half of a corpus may be in it: it is not one bad document.
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(UserError, match=f"{name} .*{message}"):
        read(tmp_path / name, max_bad=1.0)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig", "utf-16-le", "gb18030", "big5", "cp1252"])
def test_other_encodings_are_read(tmp_path: Path, encoding: str) -> None:
    texts = ["one text", "été" if encoding == "cp1252" else "今天天氣很好"] * 50_000
    path = tmp_path / "a.jsonl"
    path.write_bytes("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts).encode(encoding))
    has_mark = encoding in ("utf-16", "utf-32", "utf-8-sig")
    assert read(path, **({} if has_mark else {"encoding": encoding})) == texts


def test_what_an_encoding_cannot_read_is_a_bad_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("好\n\n".encode("gbk") + b"b\xff\xff\n\nc")
    assert read_bad(path, encoding="gbk") == (["好", "c"], ["3: not valid gbk at column 2"])
    with pytest.raises(UserError, match="--encoding gbkk is unknown"):
        read(path, encoding="gbkk")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'\xef\xbb\xbf\n [{"text": "a"}, {"text": "b"}]\n', r"is a JSON array, .*: name it \.json"),
        ("a.jsonl.gz", b'[\n{"text": "a"},\n{"text": "b"}\n]\n', "is a JSON array"),
        ("a.jsonl", b'{"text": "a"}\r{"text": "b"}\r', "ends its lines with CR alone: convert them"),
        ("a.txt", b"one\r\rtwo\r", "ends its lines with CR alone"),
    ],
)
def test_a_file_that_is_one_line_by_mistake_is_not_one_bad_document(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name, max_bad=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoding": "base64"}, "--encoding base64 is unknown"),
        ({"encoding": "rot13"}, "--encoding rot13 is unknown"),
        ({"encoding": "idna"}, "--encoding idna is unknown"),
        ({"text_field": ""}, "--text-field: no field is named"),
        ({"text_field": ()}, "--text-field: no field is named"),
        ({"max_document_bytes": 10**19}, "--max-document-bytes: 10000000000000000000 is not a number from 1 to"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(**options)


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,n,n,text\none,1,2,two\n")
    with pytest.raises(UserError, match=r"a\.csv has several columns 'text'"):
        read(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("text,n,n\none,1,2\n")
    assert read(tmp_path / "a.csv") == ["one"]


def test_nul_in_text_is_a_bad_document_not_a_bad_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\0b\n\nc\n")
    assert read_bad(path) == (["c"], ["1: NUL character at position 2"])
    path.write_bytes(b"one\n\ntwo \0 two\n\nthree")
    assert read_bad(path) == (["one", "three"], ["3: NUL character at position 5"])


def test_a_very_long_line_is_passed_over_without_being_held(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "before"}\n{"text": "')
        for _ in range(50):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n{"text": "after"}\n')
    tracemalloc.start()
    documents, problems = read_bad(path, max_document_bytes=1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert documents == ["before", "after"]
    assert problems == ["2: longer than --max-document-bytes 1,048,576"]
    assert peak < 10_000_000
    csv_path = tmp_path / "a.csv"
    csv_path.write_bytes(b"text\nbefore\n" + b"x" * 50_000_000 + b"\nafter\n")
    assert read_bad(csv_path, max_document_bytes=1 << 20)[0] == ["before", "after"]


def test_json_files_come_in_several_shapes(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content, texts in [
        ('[{"text": "a"}, {"text": "b"}]', ["a", "b"]),
        ('\ufeff\n[\n{"text": "a"}\n,\n{"text": "b"}\n]\n', ["a", "b"]),
        ('{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
        ('{\n "text":\n "a"\n}', ["a"]),
        ('{"text": "a]["} {"text": "b"}', ["a][", "b"]),
        ("[]", []),
        ("", []),
    ]:
        path.write_text(content)
        assert read(path) == texts
    path.write_text('[\n{"text": "a"},\n\n{"body": "b"},\n3,\n"c",\n[{"text": "d"}],\n{"text": "e"}]')
    documents, problems = read_bad(path)
    assert documents == ["a", "e"]
    assert [problem.split(":")[0] for problem in problems] == ["4", "5", "6", "7"]
    path.write_bytes(b'[{"text": "a"},\n{"text": "\xff"}, {"text": "c"}]')
    assert read_bad(path) == (["a", "c"], ["2: invalid Unicode: lone surrogate at position 1"])


@pytest.mark.parametrize(
    ("content", "line"), [('[{"text": "a"},\n{"text" "b"}]', 2), ('[{"text": "a"}', 1), ('[\n\n{"text": "a', 3)]
)
def test_broken_json_file_stops_the_run(tmp_path: Path, content: str, line: int) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=rf"a\.json:{line}: broken JSON"):
        read(tmp_path / "a.json", max_bad=1.0)


def test_bad_csv_rows_are_named_and_the_others_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'id,text\n1,good\n2\n3,"a ""quoted""\nrow"\n\n4,"broken"quote\n5,\xff\n6,\n7,last\n')
    documents, problems = read_bad(path)
    assert documents == ["good", 'a "quoted"\nrow', "last"]
    lines = [
        "3: 1 columns, the header has 2",
        "7: broken CSV",
        "8: invalid Unicode",
    ]
    assert len(problems) == len(lines)
    assert all(problem.startswith(line) for problem, line in zip(problems, lines, strict=True))


def test_parquet_nulls_and_wrong_columns(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    texts = pa.array(["a", None, "c"]).dictionary_encode()
    pq.write_table(pa.table({"text": texts, "large": pa.array(["x"] * 3, pa.large_string()), "n": [1, 2, 3]}), path)
    assert read_bad(path) == (["a", "c"], ["2: field 'text' is null, not a string"])
    assert read(path, text_field="large") == ["x"] * 3
    with pytest.raises(UserError, match="column 'n' is int64, not string"):
        read(path, text_field="n")
    with pytest.raises(UserError, match="no column 'body' but text, large, n: choose with --text-field"):
        read(path, text_field="body")


def test_wrong_csv_column_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no column 'body' but id, text: choose with --text-field"):
        read(write(tmp_path / "a.csv", TEXTS), text_field="body")


def test_a_long_csv_field_is_one_bad_row_whatever_is_in_it(tmp_path: Path) -> None:
    inner = "".join(f'inner line {i}, a ""quoted"" word\n' for i in range(40))
    path = tmp_path / "a.csv"
    path.write_text(f'text\nok1\n"{inner}"\nok2\n{"x" * 500}\nok3\n')
    documents, problems = read_bad(path, max_document_bytes=100)
    assert documents == ["ok1", "ok2", "ok3"]
    assert problems == ["3: longer than --max-document-bytes 100", "45: longer than --max-document-bytes 100"]


@pytest.mark.parametrize("limit", [100, 1 << 23])
def test_a_csv_quote_without_end_stops_the_run(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,l\nok1,1\n"unclosed quote, 2\n' + "".join(f"ok{i},{i}\n" for i in range(3, 300)))
    with pytest.raises(UserError, match=r"a\.csv:3: a quoted field has no end"):
        read(path, max_bad=1.0, max_document_bytes=limit)
    path.write_text('te"xt,"l"x\n')
    with pytest.raises(UserError, match="the header is broken"):
        read(path, max_bad=1.0)


def test_repeated_long_parquet_texts_take_little_memory(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x" * 392_000] * 1500}), path)
    assert path.stat().st_size < 50_000
    before = pa.default_memory_pool().max_memory()
    for _ in read_documents(resolve_sources([str(path)]), ReadOptions(), BadDocuments(0)):
        pass
    assert pa.default_memory_pool().max_memory() - before < 150_000_000


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_several_fields_are_joined(tmp_path: Path, suffix: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"title": "A", "body": "one"}, {"title": "", "body": "two"}, {"title": "C", "body": "three\n"}]
    path = tmp_path / f"a{suffix}"
    if suffix == ".csv":
        path.write_text('title,body\nA,one\n,two\nC,"three\n"\n')
    elif suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    assert read(path, text_field=("title", "body")) == ["A\n\none", "two", "C\n\nthree\n"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_dots_lead_into_nested_fields(tmp_path: Path, suffix: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"doc": {"text": "one"}, "turns": [{"content": "a"}, {"content": "b"}]}] * 2
    rows += [{"doc": {"text": None}, "turns": []}]
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    assert read_bad(path, text_field="doc.text") == (["one", "one"], ["3: field 'text' is null, not a string"])
    assert read(path, text_field="turns.content") == ["a\nb", "a\nb"]
    if suffix == ".jsonl":
        path.write_text('{"doc.text": "a key with a dot", "doc": {"text": "nested"}}')
        assert read(path, text_field="doc.text") == ["a key with a dot"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_data_set_folder_is_loaded_by_datasets(
    tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / f"train{suffix}", TEXTS)
    write(folder / f"test{suffix}", ["held out"])
    assert read(f"hf:{folder}") == TEXTS
    assert f"note: hf:{folder}: splits not read: test" in capsys.readouterr().err
    assert read(f"hf:{folder}", hf_split="test") == ["held out"]
    assert read(f"hf:{folder}", hf_split="train[:10%]", hf_streaming=False) == TEXTS[:4]
    for message, options in [
        ("has no column 'body' but id, text", {"text_field": "body"}),
        ("datasets cannot load it", {"hf_split": "nothing"}),
        ("a slice cannot be streamed: give --no-hf-streaming", {"hf_split": "train[:10%]"}),
    ]:
        with pytest.raises(UserError, match=message):
            read(f"hf:{folder}", **options)


def test_saved_data_sets_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import datasets

    one = datasets.Dataset.from_dict({"text": TEXTS})
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select(range(3))}).save_to_disk(tmp_path / "two")
    capsys.readouterr()
    assert read(f"hf:{tmp_path}/one") == read(f"hf:{tmp_path}/two") == TEXTS
    assert "splits not read: test" in capsys.readouterr().err
    for name in ("one", "two"):
        with pytest.raises(UserError, match=f"saved by Hugging Face datasets: give it as hf:{tmp_path}/{name}"):
            read(tmp_path / name)
    with pytest.raises(UserError, match=f"saved by Hugging Face datasets: give it as hf:{tmp_path}/one"):
        read(tmp_path)


class Hub:
    """A data set on the hub to which somebody pushes after each look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets

        self.looks, self.read = 0, []
        for name in ("load_dataset_builder", "load_dataset", "get_dataset_split_names"):
            monkeypatch.setattr(datasets, name, getattr(self, name))

    def load_dataset_builder(self, name: str, config: str | None, revision: str | None) -> object:
        self.looks += 1
        return types.SimpleNamespace(hash=f"commit-{revision or self.looks}")

    def load_dataset(self, name: str, config: str | None, split: str, streaming: bool, revision: str) -> object:
        import datasets

        self.read.append(revision)
        return datasets.Dataset.from_dict({"text": [f"of {revision}"]})

    def get_dataset_split_names(self, name: str, config: str | None, revision: str) -> list[str]:
        assert revision == self.read[-1]
        return ["train"]


def test_one_commit_of_a_data_set_is_read_and_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, source = Hub(monkeypatch), resolve_sources(["hf:someone/something"])[0]
    options = ReadOptions()
    find_commit.cache_clear()
    folder = CorpusFolder(tmp_path / "out", {}, [source], options, overwrite=False)
    assert read("hf:someone/something") == ["of commit-1"]
    folder.publish({"bad_documents": 0, "limit_reached": False, "splits": {}}, {})
    folder.close()
    assert json.loads((tmp_path / "out" / "corpus.json").read_text())["inputs"][0]["sha256"] == "commit-1"
    assert read("hf:someone/something", hf_revision="v2") == ["of commit-v2"] and hub.read == ["commit-1", "commit-v2"]
    find_commit.cache_clear()


def test_a_folder_is_every_file_of_a_known_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a folder, 文件夹"
    for name, data in {
        "wiki.jsonl": '{"text": "wiki one", "meta": 1}\n{"text": "wiki two", "meta": "x"}',
        "train.jsonl": '{"text": "train"}',
        "math-test.jsonl": '{"text": "math"}',
        "novel.txt": "line one\nline two\n\nline three\n",
        "sub/deep er/d.JSONL": '{"text": "deep"}',
        "sub/same.csv": "text\nin sub\n",
        "same.csv": "text\nsame\n",
        "empty.jsonl": "",
        "README.md": "not read",
        "sub/.hidden.jsonl": "not read",
        ".git/x.jsonl": "not read",
    }.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(data)
    (folder / "sub" / "around").symlink_to(folder)
    (folder / "x.jsonl").mkdir()
    (folder / "x.jsonl" / "y.txt").write_text("inside")
    expected = [
        "math",
        "same",
        "line one\nline two",
        "line three",
        "deep",
        "in sub",
        "train",
        "wiki one",
        "wiki two",
        "inside",
    ]
    assert sorted(read(folder)) == sorted(expected)
    assert read(folder) == read(f"{tmp_path}/*") == read(f"{folder}/")
    os.mkfifo(folder / "pipe.jsonl")  # would be waited for
    assert len(read(folder)) == len(expected)
    assert "pipe.jsonl" in capsys.readouterr().err.splitlines()[-1]
    (folder / "pipe.jsonl").unlink()
    read(folder)
    note = capsys.readouterr().err.splitlines()[0]
    assert note == f"note: {folder}: not read (no visible files of a known format): .git, README.md, sub/.hidden.jsonl"
    with pytest.raises(UserError, match="holds no file of a known format"):
        read(make_folder(tmp_path / "empty"))


def test_what_was_prepared_in_a_folder_is_no_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    for name in ("a.txt", "train/b.txt", "corpus.json", "out/train/manifest.json", "out/bad_documents.txt"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text('{"text": "inside"}')
    assert len(read(folder / "train")) == 1  # asked for by its own name
    (folder / "corpus.json").unlink()
    assert len(read(folder)) == 4
    (folder / "out" / "corpus.json").write_text("{}")
    assert len(read(folder)) == 2
    assert "out/bad_documents.txt, out/corpus.json, out/train" in capsys.readouterr().err


def test_a_folder_that_cannot_be_listed_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.jsonl", ["a"])
    closed, scandir = make_folder(tmp_path / "closed"), os.scandir

    def refuse(path: str) -> object:
        if path == str(closed):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=f"cannot read {closed}: Permission denied; make it readable or leave it out"):
        read(tmp_path)


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_links_lead_to_files_once(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ["a"])
    folder = make_folder(tmp_path / "folder")
    (folder / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    assert read(folder) == ["a"]
    (folder / "again.jsonl").symlink_to(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="twice"):
        read(folder)
    (folder / "again.jsonl").unlink()
    (folder / "broken.jsonl").symlink_to(tmp_path / "absent")
    with pytest.raises(UserError, match=r"cannot read .*broken\.jsonl: No such file"):
        read(folder)


def test_standard_input_and_pipes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert read("-", format="jsonl") == TEXTS
    with pytest.raises(UserError, match="say its --format"):
        read("-")
    (tmp_path / "words").write_text("one\n\ntwo")
    assert read(tmp_path / "words", format="txt") == ["one", "two"]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(data,))
    writer.start()
    assert read(pipe, format="jsonl") == TEXTS
    writer.join()


def test_a_full_temporary_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet.gz", TEXTS)

    class Full(io.BytesIO):
        def write(self, _: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", Full)
    with pytest.raises(UserError, match=rf"temporary folder {tempfile.gettempdir()}, .*No space left.*; set TMPDIR"):
        read(path)


def test_a_file_that_changes_while_it_is_read_stops_the_run(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", TEXTS)
    documents = read_documents(resolve_sources([str(path)]), ReadOptions(), BadDocuments(0))
    next(documents)
    with path.open("a") as file:
        file.write("more\n")
    with pytest.raises(UserError, match="changed while it was read"):
        list(documents)


def test_inputs_are_resolved_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "sub/c.JSONL", "sub/d.txt.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [Path(s.name).name for s in resolve_sources([f"{tmp_path}/*.jsonl"])] == ["a.jsonl", "b.jsonl"]
    assert [s.format for s in resolve_sources([f"{tmp_path}/sub/*"])] == ["jsonl", "txt"]
    everything = resolve_sources([f"{tmp_path}/**/*.*", "hf:name/of-it", "owner/name"])
    assert [s.format for s in everything] == ["jsonl", "jsonl", "jsonl", "txt", "dataset", "dataset"]
    assert everything[4].name == "name/of-it" and everything[3].compression == ".gz"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "names no file"),
        (["{tmp}/*.parquet"], "matches no file"),
        (["{tmp}/absent.jsonl"], "does not exist"),
        (["absent.jsonl"], "does not exist"),
        (["./a/b/c"], "does not exist"),
        (["{tmp}/a.md"], "no known format"),
        (["{tmp}/a.jsonl", "{tmp}/*.jsonl"], "twice"),
        (["hf:"], "names no data set"),
    ],
)
def test_wrong_inputs_are_user_errors(tmp_path: Path, words: list[str], message: str) -> None:
    for name in ("a.jsonl", "a.md"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=message):
        resolve_sources([word.format(tmp=tmp_path) for word in words])


def test_too_many_bad_documents_stop_the_run(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' * 98 + "broken\n" * 2)
    assert len(read(path, max_bad=0.02)) == 98
    with pytest.raises(
        UserError, match=r"2 of 100 documents are bad, above --max-bad-fraction 0\.01; .*a\.jsonl:99: broken"
    ):
        read(path, max_bad=0.01)
    path.write_text("broken\n" * 100_000 + '{"text": "good"}\n')
    with pytest.raises(UserError, match="of 7,490 documents"):  # after one chunk
        next(iter(read_documents(resolve_sources([str(path)]), ReadOptions(), BadDocuments(0.01))))


def test_only_the_first_problems_are_shown_but_all_are_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("broken\n" * 50)
    assert len(read_bad(path)[1]) == 50
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 21
    assert shown[0].startswith(f"skipped: {path}:1: ")
