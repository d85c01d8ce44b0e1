"""A corpus from text that every Python installation has: python -m data_prep.default_corpus --output FILE.jsonl.

This repository's documents, Python's help topics, descriptions of installed packages, and docstrings, in that order.
Source files are parsed, never imported, and no network is used.
"""

import ast
import importlib.metadata
import json
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any, NamedTuple, cast

import tyro
from tqdm import tqdm

from data_prep.writing.pool import count_workers, map_ordered
from minimind.cli import parse_flags
from minimind.errors import UserError, run_main
from minimind.files import ROOT, disk_errors, replace_file

_DOCUMENT_CHARACTERS = 1000
_LONGEST_DOCUMENT = 20_000
_SHORTEST_DOCUMENT = 120
_LEAST_LETTERS = 0.7
_LARGEST_FILE = 1 << 21
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "testing", "idle_test", "_vendor", "licenses"}
_PROSE_PACKAGES = ("numpy", "pandas", "networkx")
"""Long and carefully written docstrings: taken before those of other packages."""
_LICENCE = re.compile(r"copyright|licen[cs]ed? |warrant|all rights reserved|permission is", re.IGNORECASE)
# A Markdown heading, or a line underlined by the next one.
_HEADING = re.compile(r"^(?=#{1,6} \S)|^(?=[^\s].*\n(?:={3,}|-{3,}|~{3,}|\^{3,}|\*{3,})[ \t]*$)", re.MULTILINE)
# Badges, pictures, raw HTML, link targets, table rows.
_NO_TEXT = re.compile(
    r"^[ \t]*(?:\[?!\[|<|\.\. (?:image|figure|_|\|)|:target:|:alt:|\[[^\]]+\]:[ \t]|\|.*\|[ \t]*$).*\n?", re.M
)
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Document(NamedTuple):
    """A text, and where it was found."""

    text: str
    source: str


@dataclass(frozen=True, kw_only=True)
class DefaultCorpusFlags:
    """Collect a small corpus of technical prose from Python and its installed packages."""

    output: Path
    """The JSONL file to write: {"text": ..., "source": ...} a line."""
    max_bytes: int = 14_000_000
    """Stop collecting at this size."""
    workers: int = 0
    """Processes that read sources (0: one for each core)."""
    overwrite: bool = False
    """Replace the file if it exists."""


def main() -> None:
    flags = parse_flags(
        DefaultCorpusFlags, sys.argv[1:], default=tyro.MISSING_NONPROP, prog="python -m data_prep.default_corpus"
    )
    if flags.output.exists() and not flags.overwrite:
        raise UserError(f"{flags.output} already exists: choose another --output or give --overwrite")
    lines: list[str] = []
    total = 0
    with tqdm(total=flags.max_bytes, desc="collecting", unit="B", unit_scale=True, disable=None) as progress:
        for document in drop_repeated(collect_documents(count_workers(flags.workers))):
            size = len(document.text.encode())
            lines.append(json.dumps(document._asdict(), ensure_ascii=False) + "\n")
            total += size
            progress.update(size)
            if total >= flags.max_bytes:
                break
    with disk_errors(flags.output):
        flags.output.parent.mkdir(parents=True, exist_ok=True)
        replace_file(flags.output, "".join(lines))
    print(f"{flags.output}: {len(lines):,} documents, {total:,} bytes of text")


def collect_documents(workers: int) -> Iterator[Document]:
    """Every document, best prose first; the same order on every run on one machine."""
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]):
        yield from _split_sections(read_source(path), f"{ROOT.name}/{path.relative_to(ROOT)}")
    for name, topic in sorted(topics.topics.items()):
        yield Document(topic, f"python:{name}")
    packages: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions():
        # The first of two with one name is the one that Python would import.
        packages.setdefault((distribution.metadata["Name"] or "").lower(), distribution)
    for name in sorted(packages):
        description = cast(Any, packages[name].metadata).get_payload()
        yield from _split_sections(str(description or ""), f"description of {name}")
    library = Path(sysconfig.get_path("stdlib"))
    modules = [(path, library) for path in sorted(library.rglob("*.py")) if _is_wanted(path.relative_to(library))]
    for name in sorted(packages, key=lambda name: (name not in _PROSE_PACKAGES, name)):
        root = Path(str(packages[name].locate_file("")))
        modules += [(root / file, root) for file in sorted(packages[name].files or [], key=str) if _is_wanted(file)]
    pieces_of_modules = map_ordered(_parse_module, (path for path, _ in modules), workers)
    for (path, root), pieces in zip(modules, pieces_of_modules, strict=False):
        yield from _pack(pieces, ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"))


def drop_repeated(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents that are prose, each text once."""
    seen: set[str] = set()
    for document in documents:
        if document.text not in seen and is_prose(document.text):
            seen.add(document.text)
            yield document


def find_docstrings(source: str) -> list[str]:
    """Docstrings under the name and arguments that they document, in order; none if the source does not parse."""
    tree = parse_source(source)
    found = []
    nodes = [node for node in ast.walk(tree) if isinstance(node, _Documented)] if tree else []
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        paragraphs = (ast.get_docstring(node) or "").split("\n\n")
        text = "\n\n".join(paragraph for paragraph in paragraphs if not _LICENCE.search(paragraph)).strip()
        if not text:
            continue
        if isinstance(node, ast.ClassDef):
            text = f"class {node.name}\n\n{text}"
        elif not isinstance(node, ast.Module):
            text = f"{node.name}({ast.unparse(node.args)})\n\n{text}"
        found.append(text)
    return found


def parse_source(source: str) -> ast.Module | None:
    """The syntax tree of Python source; None if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def read_source(path: Path) -> str:
    """The text of a file, or nothing if it is no text, too large, or gone."""
    try:
        return path.read_text(encoding="utf-8") if path.stat().st_size <= _LARGEST_FILE else ""
    except (OSError, UnicodeDecodeError):
        return ""


def is_prose(text: str) -> bool:
    """Whether a text is long enough and mostly letters: no table of numbers, no encoded data, no odd characters."""
    if len(text) < _SHORTEST_DOCUMENT or re.search("[\0\ud800-\udfff]", text) or re.search(r"[!-~]{201}", text):
        return False
    others = len(re.findall(r"[^\w\s]|[\d_]", text))
    return 1 - others / max(len("".join(text.split())), 1) >= _LEAST_LETTERS


def _is_wanted(path: Any) -> bool:
    return path.suffix == ".py" and not _SKIPPED_FOLDERS.intersection(path.parts) and ".." not in path.parts


def _split_sections(text: str, source: str) -> Iterator[Document]:
    return _pack(_HEADING.split(re.sub(r"\n{3,}", "\n\n", _NO_TEXT.sub("", text.replace("\r\n", "\n")))), source)


def _pack(pieces: Iterable[str], source: str) -> Iterator[Document]:
    """Pieces joined in order to documents of about a thousand characters; a very long one is cut at a blank line."""
    packed = ""
    for piece in pieces:
        packed = f"{packed}\n\n{piece.strip()}".lstrip("\n")
        while len(packed) > _LONGEST_DOCUMENT:
            end = packed.rfind("\n\n", 1, _LONGEST_DOCUMENT)
            end = end if end > 0 else _LONGEST_DOCUMENT
            yield Document(packed[:end], source)
            packed = packed[end:].lstrip("\n")
        if len(packed) >= _DOCUMENT_CHARACTERS:
            yield Document(packed, source)
            packed = ""
    if packed:
        yield Document(packed, source)


def _parse_module(path: Path) -> list[str]:
    return find_docstrings(read_source(path))


if __name__ == "__main__":
    run_main(main)
