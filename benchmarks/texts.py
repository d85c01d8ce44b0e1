"""The text that the benchmarks train on, and its shards.

Short documents, as a language model is trained on them: the descriptions of all packages from the package lists that a
Debian machine has; elsewhere the default corpus, whose documents are longer. A file may be given instead.
"""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

from measure import ROOT

_LISTS = Path("/var/lib/apt/lists")
_READER = Path("/usr/lib/apt/apt-helper")
_ENOUGH = 10_000  # descriptions; fewer are the few of a single repository


def find_text(given: Path | None, folder: Path) -> Path:
    """`given`, or a JSONL file made in `folder` from what this machine has."""
    if given is not None:
        if not given.is_file():
            raise SystemExit(f"--text {given}: no such file")
        return given.resolve()
    documents = read_descriptions()
    path = folder / "text.jsonl"
    if len(documents) < _ENOUGH:
        run_module("data_prep.default_corpus", "--output", path)
        return path
    random.Random(0).shuffle(documents)
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents))
    return path


def read_descriptions() -> list[str]:
    """The long descriptions of Debian's packages, each once, in every language that the lists hold."""
    texts: dict[str, None] = {}
    for path in sorted(_LISTS.glob("*_i18n_Translation-*")) if _READER.exists() else []:
        content = subprocess.run([_READER, "cat-file", path], capture_output=True, check=False).stdout.decode()
        for entry in content.split("\n\n"):
            found = re.search(r"^Description-(?!md5)\S+: (.*(?:\n .*)*)", entry, re.M)
            if found:
                first, *rest = found.group(1).split("\n")
                texts["\n".join([first, *("" if line == " ." else line[1:] for line in rest)])] = None
    return list(texts)


def make_shards(source: Path, tokenizer: Path, folder: Path, val_fraction: float = 0.01) -> Path:
    """Shards of `source` by `tokenizer` in `folder`."""
    flags = ("--input", source, "--tokenizer", tokenizer, "--output", folder, "--val-fraction", val_fraction)
    run_module("data_prep.tokenize_corpus", *flags)
    return folder


def run_module(module: str, *flags: object) -> None:
    """Run a module of this repository; its messages are shown only when it fails."""
    command = [sys.executable, "-m", module, *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr.strip()[-500:]}")
