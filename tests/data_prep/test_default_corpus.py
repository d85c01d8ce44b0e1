"""The default corpus: enough text, no repeats, the same every time, nothing imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.default_corpus import Document, collect_documents, drop_repeated, find_docstrings, is_prose

SOURCE = '''
"""Module text.

Copyright somebody, all rights reserved.
"""

class Thing(Base):
    """What a thing is."""

    def do(self, x: int = 1) -> None:
        """Do it."""

    def undocumented(self): ...

async def outer():
    """Outside."""

    def inner(*args):
        r"""Inside \\d."""

print("not documentation " * 30)
'''


def run(*flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_prep.default_corpus", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_docstrings_come_with_their_names_in_order() -> None:
    assert find_docstrings(SOURCE) == [
        "Module text.",
        "class Thing\n\nWhat a thing is.",
        "do(self, x: int=1)\n\nDo it.",
        "outer()\n\nOutside.",
        "inner(*args)\n\nInside \\d.",
    ]


@pytest.mark.parametrize("source", ["def broken(:", "x = '\\0\0'", "(" * 5000, ""])
def test_source_that_does_not_parse_gives_nothing(source: str) -> None:
    assert find_docstrings(source) == []


def test_tables_and_encoded_data_are_no_prose() -> None:
    assert is_prose("This is a sentence about nothing in particular, but it is one. " * 3)
    assert is_prose("这是一个关于训练语言模型的句子,它很长,也很自然。" * 10)
    assert not is_prose("too short")
    assert not is_prose("| 1.25 | 3.50 | 12 | 99 |\n" * 20)
    assert not is_prose("the key is " + "QUJDREVGR0hJSktMTU5PUA" * 20)


def test_repeated_documents_are_dropped() -> None:
    text = "This is a sentence about nothing in particular, but it is one. " * 3
    assert list(drop_repeated([Document(text, "a"), Document(text, "b"), Document(text + "!", "c")])) == [
        Document(text, "a"),
        Document(text + "!", "c"),
    ]


def collect(workers: int, min_bytes: int) -> list[Document]:
    documents, total = [], 0
    for document in drop_repeated(collect_documents(workers)):
        documents.append(document)
        total += len(document.text.encode())
        if total >= min_bytes:
            break
    assert total >= min_bytes
    return documents


def test_there_are_five_megabytes_in_the_same_order_each_time() -> None:
    documents = collect(2, 5_000_000)
    assert len({document.text for document in documents}) == len(documents) > 1000
    again = collect(1, 2_500_000)  # beyond the documents: docstrings too
    assert again == documents[: len(again)]
    # Small pieces are packed, large ones cut, badges and raw HTML left out.
    assert all(len(doc.text) <= 22_000 for doc in documents if not doc.source.startswith("python:"))
    assert sum(len(document.text) for document in documents) / len(documents) > 800
    readme = [document.text for document in documents if document.source.endswith("/README.md")]
    assert len(readme) > 5 and all(text.startswith("#") for text in readme) and "<!--" not in "".join(readme)


def test_nothing_is_imported_to_read_it() -> None:
    code = (
        "import sys; from data_prep.default_corpus import collect_documents\n"
        "next(s for s in collect_documents(1) if s.source.startswith('asyncio.'))\n"
        "print([m for m in ('asyncio.tasks', 'aifc', 'pandas', 'numpy', 'torch') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_command_writes_jsonl_once(tmp_path: Path) -> None:
    output = tmp_path / "new" / "corpus.jsonl"
    flags = ("--output", output, "--max-bytes", 300_000)
    result = run(*flags)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert all(set(line) == {"text", "source"} for line in lines)
    assert sum(len(line["text"].encode()) for line in lines) >= 300_000
    again = run(*flags)
    assert again.returncode == 2 and "--overwrite" in again.stderr


def test_too_little_text_and_unwritable_output_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("--output", tmp_path / "file" / "c.jsonl", "--max-bytes", 1000)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: cannot write")


def test_a_negative_number_of_workers_is_one_line(tmp_path: Path) -> None:
    result = run("--output", tmp_path / "c.jsonl", "--workers", -2)
    assert result.returncode == 2 and "error: --workers -2: must be at least 1" in result.stderr
