"""The default corpus: enough text, no repeats, the same every time, nothing imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.default_corpus import Section, collect_sections, drop_repeated
from data_prep.local_text.docstrings import find_docstrings
from data_prep.local_text.prose import is_prose, pack_pieces, split_sections

SOURCE = '''
"""Module text.

Copyright somebody, all rights reserved.
"""

# A comment that is long enough to be kept, because it explains something at
# length: why the thing below is done as it is done, what else was tried, and
# what went wrong with that. Nobody should have to find that out a second time.
class Thing(Base):
    """What a thing is."""

    def do(self, x: int = 1) -> None:
        """Do it."""

    def undocumented(self): ...

async def outer():
    """Outside."""

    def inner(*args):
        r"""Inside \\d."""

add_newdoc("package.module", "sin", """
    Sine of x.

    More.
    """)
print("not documentation " * 30)
'''


def run(*flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_prep.default_corpus", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_docstrings_come_with_their_names_in_order() -> None:
    pieces = find_docstrings(SOURCE, "package.module")
    comment = pieces.pop(1)
    assert comment.startswith("A comment that is long enough") and "#" not in comment
    assert pieces == [
        "module package.module\n\nModule text.",
        "class Thing(Base)\n\nWhat a thing is.",
        "Thing.do(self, x: int=1)\n\nDo it.",
        "outer()\n\nOutside.",
        "outer.inner(*args)\n\nInside \\d.",
        "sin\n\nSine of x.\n\nMore.",
    ]


@pytest.mark.parametrize("source", ["def broken(:", "x = '\\0\0'", "(" * 5000, ""])
def test_source_that_does_not_parse_gives_nothing(source: str) -> None:
    assert find_docstrings(source, "m") == []


def test_sections_begin_with_their_headings_and_lose_no_text() -> None:
    body = "A sentence of the section. " * 40
    text = f"# First\n\n{body}\n\n## Second\n\n{body}\n\nThird\n=====\n\n{body}"
    sections = list(split_sections("[![badge](x)](y)\n<img src='z'>\n" + text))
    assert [section.split("\n")[0] for section in sections] == ["# First", "## Second", "Third"]
    assert "".join(sections).replace("\n", "").count("A sentence of the section.") == 120
    assert not any("badge" in section or "<img" in section for section in sections)


def test_small_pieces_are_packed_and_large_ones_cut() -> None:
    packed = list(pack_pieces([f"piece {i} " + "x" * 100 for i in range(100)]))
    assert len(packed) < 15 and all(len(text) >= 1000 for text in packed[:-1])
    large = "\n\n".join(["paragraph " * 50] * 200)
    cut = list(pack_pieces([large]))
    assert all(len(text) <= 22_000 for text in cut)
    assert sum(text.count("paragraph") for text in cut) == 10_000


def test_tables_and_encoded_data_are_no_prose() -> None:
    assert is_prose("This is a sentence about nothing in particular, but it is one. " * 3)
    assert is_prose("这是一个关于训练语言模型的句子,它很长,也很自然。" * 10)
    assert not is_prose("too short")
    assert not is_prose("| 1.25 | 3.50 | 12 | 99 |\n" * 20)
    assert not is_prose("the key is " + "QUJDREVGR0hJSktMTU5PUA" * 20)


def test_repeated_sections_are_dropped() -> None:
    text = "This is a sentence about nothing in particular, but it is one. " * 3
    assert list(drop_repeated([Section(text, "a"), Section(text, "b"), Section(text + "!", "c")])) == [
        Section(text, "a"),
        Section(text + "!", "c"),
    ]


def test_there_are_five_megabytes_in_the_same_order_each_time() -> None:
    def collect(workers: int, min_bytes: int) -> list[Section]:
        sections, total = [], 0
        for section in drop_repeated(collect_sections(workers)):
            sections.append(section)
            total += len(section.text.encode())
            if total >= min_bytes:
                break
        assert total >= min_bytes
        return sections

    sections = collect(2, 5_000_000)
    assert len({section.text for section in sections}) == len(sections) > 1000
    again = collect(1, 1_500_000)  # beyond the documents: docstrings too
    assert again == sections[: len(again)]


def test_nothing_is_imported_to_read_it() -> None:
    code = (
        "import sys; from data_prep.default_corpus import collect_sections\n"
        "next(s for s in collect_sections(1) if s.source.startswith('asyncio.'))\n"
        "print([m for m in ('asyncio.tasks', 'aifc', 'pandas', 'numpy', 'torch') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_command_writes_jsonl_once(tmp_path: Path) -> None:
    output = tmp_path / "new" / "corpus.jsonl"
    flags = ("--output", output, "--min-bytes", 300_000, "--max-bytes", 300_000)
    result = run(*flags)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert all(set(line) == {"text", "source"} for line in lines)
    assert sum(len(line["text"].encode()) for line in lines) >= 300_000
    again = run(*flags)
    assert again.returncode == 2 and "--overwrite" in again.stderr


def test_too_little_text_and_unwritable_output_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("--output", tmp_path / "file" / "c.jsonl", "--min-bytes", 1000, "--max-bytes", 1000)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: cannot write")
