"""The corpus that every machine already has: python -m data_prep.default_corpus --output FILE.jsonl.

Python's own documentation and docstrings, the descriptions and docstrings of installed packages, and this repository's
documents; one section a line. Reads files only: imports none of them, and no network. Knows nothing of tokens.
"""

import hashlib
import importlib.metadata
import json
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any, NamedTuple

import tyro
from tqdm import tqdm

from data_prep.local_text.docstrings import find_docstrings
from data_prep.local_text.prose import is_prose, pack_pieces, split_sections
from data_prep.writing.pool import count_cores, map_ordered
from minimind.cli import parse_flags
from minimind.errors import UserError, run_main
from minimind.files import ROOT, replace_file

_DOCUMENT_SUFFIXES = (".md", ".rst", ".txt")
_LARGEST_FILE = 1 << 21
_SKIPPED_FOLDERS = frozenset(
    ("__pycache__", "site-packages", "dist-packages", "test", "tests", "testing", "idle_test", "_vendor", "licenses")
)
_PROSE_PACKAGES = ("numpy", "pandas", "networkx")
"""Their docstrings are long and written with care: they come before those of other packages."""


class Section(NamedTuple):
    """One document: its text, and where it was found."""

    text: str
    source: str


@dataclass(frozen=True, kw_only=True)
class DefaultCorpusFlags:
    """Collect a small corpus of technical prose from what Python and its packages bring along."""

    output: Path
    """The JSONL file to write: {"text": ..., "source": ...} a line."""
    min_bytes: int = 5_000_000
    """Fail if less text is found."""
    max_bytes: int = 14_000_000
    """Stop collecting when there is so much (and --min-bytes is reached)."""
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
    total, wanted = 0, max(flags.min_bytes, flags.max_bytes)
    with tqdm(total=wanted, desc="collecting", unit="B", unit_scale=True, disable=None) as progress:
        for section in drop_repeated(collect_sections(flags.workers or count_cores())):
            size = len(section.text.encode())
            lines.append(json.dumps(section._asdict(), ensure_ascii=False) + "\n")
            total += size
            progress.update(size)
            if total >= wanted:
                break
    if total < flags.min_bytes:
        raise UserError(f"only {total:,} bytes of text found on this machine, --min-bytes is {flags.min_bytes:,}")
    try:
        flags.output.parent.mkdir(parents=True, exist_ok=True)
        replace_file(flags.output, "".join(lines))
    except OSError as error:
        raise UserError(f"cannot write {flags.output}: {error.strerror}") from None
    print(f"{flags.output}: {len(lines):,} documents, {total:,} bytes of text")


def collect_sections(workers: int) -> Iterator[Section]:
    """All sections, always in the same order on the same machine: the best prose first."""
    yield from _read_documents(ROOT, [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
    for name, topic in sorted(topics.topics.items()):
        yield Section(_tidy(topic), f"python:{name}")
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(_walk(library))
    yield from _read_documents(library, files)
    distributions = _find_distributions()
    for name in sorted(distributions):
        yield from _read_description(distributions[name])
    modules = [_name_module(path, library) for path in files if path.suffix == ".py"]
    order = sorted(distributions, key=lambda name: (name not in _PROSE_PACKAGES, name))
    for name in order:
        modules += _find_modules(distributions[name])
    for source, pieces in zip((m for _, m in modules), map_ordered(_parse_module, modules, workers), strict=False):
        for text in pack_pieces(pieces):
            yield Section(text, source)


def drop_repeated(sections: Iterable[Section]) -> Iterator[Section]:
    """Sections that are prose, each text once."""
    seen: set[bytes] = set()
    for section in sections:
        digest = hashlib.blake2b(section.text.encode("utf-8", "replace"), digest_size=16).digest()
        if digest not in seen and is_prose(section.text):
            seen.add(digest)
            yield section


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        yield from (Path(parent, name) for name in files if name.endswith((".py", *_DOCUMENT_SUFFIXES)))


def _read_documents(root: Path, paths: Iterable[Path]) -> Iterator[Section]:
    for path in sorted(paths):
        if path.suffix in _DOCUMENT_SUFFIXES and (text := _read(path)):
            for section in split_sections(text):
                yield Section(section, f"{root.name}/{path.relative_to(root)}")


def _find_distributions() -> dict[str, importlib.metadata.Distribution]:
    found: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions():
        # Of two with the same name the first stands before the other on the path.
        found.setdefault((distribution.metadata["Name"] or "").lower(), distribution)
    return {name: distribution for name, distribution in found.items() if name}


def _read_description(distribution: importlib.metadata.Distribution) -> Iterator[Section]:
    metadata: Any = distribution.metadata
    # Old metadata carries it in a header, each line indented.
    header = metadata.get("Description") or ""
    text = str(metadata.get_payload() or "") or "\n".join(line.removeprefix("        ") for line in header.split("\n"))
    for section in split_sections(_tidy(text)):
        yield Section(section, f"description of {metadata['Name']}")


def _find_modules(distribution: importlib.metadata.Distribution) -> list[tuple[Path, str]]:
    modules = []
    for file in sorted(distribution.files or [], key=str):
        if file.suffix == ".py" and not _SKIPPED_FOLDERS.intersection(file.parts) and ".." not in file.parts:
            path = Path(str(distribution.locate_file(file)))
            modules.append(_name_module(path, Path(str(distribution.locate_file("")))))
    return modules


def _name_module(path: Path, root: Path) -> tuple[Path, str]:
    parts = path.relative_to(root).with_suffix("").parts
    return path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _parse_module(module: tuple[Path, str]) -> list[str]:
    path, name = module
    return find_docstrings(_read(path), name)


def _read(path: Path) -> str:
    """The text of a file, or nothing if it is no text, too large, or gone."""
    try:
        return _tidy(path.read_text(encoding="utf-8")) if path.stat().st_size <= _LARGEST_FILE else ""
    except (OSError, UnicodeDecodeError):
        return ""


def _tidy(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\0", "")


if __name__ == "__main__":
    run_main(main)
