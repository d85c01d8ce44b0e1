"""A bad document is one line and left out; a file that cannot be read stops the run."""

import errno
import gzip
import io
import tempfile
from pathlib import Path

import pytest
from corpus_inputs import TEXTS, read, read_bad, write

from data_prep.reading.documents import BadDocuments, read_documents
from data_prep.reading.records import ReadOptions
from data_prep.reading.sources import resolve_sources
from minimind.errors import UserError


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
