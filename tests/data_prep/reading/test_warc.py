"""WARC files. texts.warc.wet.gz was written by warcio 1.8.1: a warcinfo, three conversions of text, a page in HTML."""

import gzip
import json
from pathlib import Path

import pytest
from prepared_corpus import Prepare, read_texts

from minimind.errors import UserError

WET = Path(__file__).parent / "texts.warc.wet.gz"
TEXTS = ["First page.\nIt has two lines.\n", "第二页，汉字。", "Third\n\nwith a blank line\n"]


def test_each_text_is_a_document_and_what_is_none_is_said(tmp_path: Path, prepare: Prepare) -> None:
    flags = {"val_fraction": 0, "max_bad_fraction": 0.5}
    prepare(tmp_path / "out", WET, **flags)
    assert read_texts(tmp_path / "out/train") == TEXTS
    bad = (tmp_path / "out/bad_documents.txt").read_text().splitlines()
    assert bad == [f"{WET}:5: a response of type application/http, not text: give WET files"]
    assert json.loads((tmp_path / "out/corpus.json").read_text())["bad_documents"] == 1
    (tmp_path / "plain.warc").write_bytes(gzip.decompress(WET.read_bytes()))
    prepare(tmp_path / "plain", tmp_path / "plain.warc", max_document_bytes=25, **flags)
    assert read_texts(tmp_path / "plain/train") == TEXTS[1:]
    with pytest.raises(UserError, match="1 of 4 documents are bad"):
        prepare(tmp_path / "strict", WET, val_fraction=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-20], "record 5 is cut short: 1. of its"),
        (lambda data: data[: data.index(b"First")], "record 2 is cut short"),
        (lambda data: data[: data.index(b"conversion")], r"cut short in the headers of record 2"),
        (lambda data: b"X" + data, "record 1 does not begin with WARC/"),
        (lambda data: data.replace(b"Content-Length: 30", b"Content-Length: -3"), "has the Content-Length '-3'"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, prepare: Prepare, change, message: str) -> None:
    (tmp_path / "a.warc").write_bytes(change(gzip.decompress(WET.read_bytes())))
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "out", tmp_path / "a.warc", val_fraction=0, max_bad_fraction=1)
    assert not (tmp_path / "out").exists()
