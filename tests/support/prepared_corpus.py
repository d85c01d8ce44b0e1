"""The command data_prep.tokenize_corpus on small texts, in this process or its own, and what it wrote."""

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.tokenize_corpus import main
from data_prep.writing.corpus_writer import CorpusWriter
from minimind.data.shards import ShardReader
from minimind.data.tokenizer import load_tokenizer

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "12",
    "dogs",
    "and",
    "ran",
    "你好",
    "世界",
    "<|im_start|>",
    "def",
    "f(x):",
    "\n",
    "",
]


def make_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [f"{i} " + " ".join(rng.choices(WORDS, k=rng.randrange(1, 60))) for i in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


class Prepare:
    """The command, in this process (or in its own, with `in_process=False`)."""

    def __init__(self, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._tokenizer = tokenizer_folder
        self._monkeypatch = monkeypatch

    def flags(self, output: Path, *inputs: object, **flags: object) -> list[str]:
        words = ["--input", *map(str, inputs), "--tokenizer", str(self._tokenizer), "--output", str(output)]
        for name, value in {"workers": 1, "shard-tokens": 5000, "val-fraction": 0.1, **flags}.items():
            name = name.replace("_", "-")
            words += [f"--{name}", str(value)] if not isinstance(value, bool) else [f"--{'' if value else 'no-'}{name}"]
        return words

    def __call__(self, output: Path, *inputs: object, **flags: object) -> None:
        self._monkeypatch.setattr(sys, "argv", ["tokenize_corpus", *self.flags(output, *inputs, **flags)])
        main()

    def start(self, output: Path, *inputs: object, **flags: object) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "data_prep.tokenize_corpus", *self.flags(output, *inputs, **flags)]

        def hear_interrupts() -> None:  # a shell starts what it puts in the background with SIGINT ignored
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts
        )

    def run(self, output: Path, *inputs: object, **flags: object) -> "subprocess.CompletedProcess[str]":
        process = self.start(output, *inputs, **flags)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess([], process.returncode, out, err)


def read_texts(folder: Path) -> list[str]:
    """The documents of a shard folder, as text."""
    reader, tokenizer = ShardReader(folder), load_tokenizer(folder)
    tokens = reader.read(0, reader.num_tokens)
    starts = reader.document_starts(0, reader.num_tokens)
    assert all(tokens[start - 1] == tokenizer.eos_token_id for start in [*starts[1:], reader.num_tokens])
    return [tokenizer.decode(document[:-1]) for document in np.split(tokens, starts[1:])]


def read_both(output: Path) -> list[str]:
    return read_texts(output / "train") + read_texts(output / "val")


def read_folder(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def interrupt_at(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    add_chunk = CorpusWriter.add_chunk

    def add(self: CorpusWriter, index: int, *args: object) -> int:
        if index == chunk:
            raise KeyboardInterrupt
        return add_chunk(self, index, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(CorpusWriter, "add_chunk", add)


def find_unfinished(output: Path) -> bool:
    """Whether nothing in the folder could be taken for a finished corpus."""
    return not output.exists() or {file.name for file in output.iterdir()} <= {".lock", ".partial"}
