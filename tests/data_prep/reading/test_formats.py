"""Every format gives the same documents, and chunks never change them."""

import gzip
import json
import random
from pathlib import Path

import pytest
import zstandard
from corpus_inputs import COMPRESS, TEXTS, read, read_bad, write

import data_prep.reading.chunks
import data_prep.reading.tables
from data_prep.reading.documents import BadDocuments, read_documents
from data_prep.reading.records import ReadOptions
from data_prep.reading.sources import resolve_sources


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


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig", "utf-16-le", "gb18030", "big5", "cp1252"])
def test_other_encodings_are_read(tmp_path: Path, encoding: str) -> None:
    texts = ["one text", "été" if encoding == "cp1252" else "今天天氣很好"] * 50_000
    path = tmp_path / "a.jsonl"
    path.write_bytes("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts).encode(encoding))
    has_mark = encoding in ("utf-16", "utf-32", "utf-8-sig")
    assert read(path, **({} if has_mark else {"encoding": encoding})) == texts


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
