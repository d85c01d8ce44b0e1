"""The recipe of launch/clean_corpus.py: what is planted is found, by the rule that it breaks, and nothing else goes.

Runs where datatrove and spaCy are installed (requirements-clean.txt), which the rest of the suite does not need.
"""

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from prepared_corpus import Prepare, read_both
from repository import ROOT

from data_prep.train_tokenizer import cut_sentences, save_tokenizer, train_tokenizer

pytest.importorskip("datatrove", reason="datatrove is not installed (requirements-clean.txt)")
pytest.importorskip("spacy", reason="spaCy is not installed (requirements-clean.txt)")

STOP_WORDS = ["the", "be", "to", "of", "and", "that", "have", "with"]


def make_prose(count: int, seed: int = 0, stop_words: float = 0.3) -> list[str]:
    """Documents that no rule minds, of made-up words; without stop words one does."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprstv" for b in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randrange(2, 4))) for _ in range(4000)]

    def sentence() -> str:
        chosen = [rng.choice(words) if rng.random() >= stop_words else rng.choice(STOP_WORDS) for _ in range(14)]
        return " ".join(chosen).capitalize() + "."

    return [
        "\n".join(" ".join(sentence() for _ in range(3)) for _ in range(rng.randrange(6, 18))) for _ in range(count)
    ]


def near_copy(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    words[rng.randrange(len(words) - 1)] = "changed"
    return " ".join(words)


def clean(*flags: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "launch/clean_corpus.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_what_is_planted_is_found_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, prose = random.Random(1), make_prose(1800)
    copies = {near_copy(text, rng): text for text in prose[::25]}
    bad = {
        "gopher-repetition": ["The same line of text is here again with the rest of that.\n" * 30] * 7,
        "gopher-quality": make_prose(8, seed=7, stop_words=0),
        "c4": [f"{text}\nAnd that line {{ is code }}." for text in make_prose(9, seed=5)],
        "contaminated": make_prose(5, seed=6),
    }
    texts = [*prose, *copies, *(text for planted in bad.values() for text in planted)]
    rng.shuffle(texts)
    assert 4.5e6 < sum(map(len, texts)) < 5.5e6
    source = tmp_path / "raw.jsonl"
    source.write_text("".join(json.dumps({"text": text, "url": f"u{i}"}) + "\n" for i, text in enumerate(texts)))
    questions = [{"question": " ".join(text.split()[9:40]), "answer": "yes"} for text in bad["contaminated"]]
    (tmp_path / "test_set.jsonl").write_text("".join(json.dumps(record) + "\n" for record in questions))
    flags = ("--input", source, "--output", tmp_path / "out", "--decontaminate", tmp_path / "test_set.jsonl")
    result = clean(*flags, "--workers", 1)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    removed = {rule: part["documents"] for rule, part in report["removed"].items()}
    assert removed == {**{rule: len(planted) for rule, planted in bad.items()}, "near-duplicates": len(copies)}
    assert report["removed"]["c4"]["reasons"] == {"curly_bracket": 9}
    for rule, count in removed.items():
        assert any(f"{count:,} " in line and rule in line for line in result.stdout.splitlines())

    def read(folder: Path) -> list[dict]:
        files = sorted(folder.glob("*.jsonl.gz"))
        return [json.loads(line) for file in files for line in gzip.open(file, "rt")]

    # Of each pair one is left, whichever came first.
    kept = {record["text"] for record in read(tmp_path / "out/kept")}
    assert len(kept) == len(prose) and all((copy in kept) != (text in kept) for copy, text in copies.items())
    assert {record["text"] for record in read(tmp_path / "out/removed/contaminated")} == set(bad["contaminated"])
    assert all(record["metadata"]["url"] for record in read(tmp_path / "out/kept"))
    # Our reader takes it as it is.
    save_tokenizer(train_tokenizer(list(cut_sentences(prose[:20])), 400), tmp_path / "tokenizer")
    Prepare(tmp_path / "tokenizer", monkeypatch)(tmp_path / "corpus", tmp_path / "out/kept")
    assert set(read_both(tmp_path / "corpus")) == kept
    # The same command again has nothing to do; other flags are refused.
    assert "nothing to do" in clean(*flags, "--workers", 1).stdout
    other = clean(*flags, "--workers", 1, "--ngram", 13)
    assert other.returncode == 2 and "other flags or inputs" in other.stderr and other.stderr.count("\n") == 1


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    flags = ("--input", tmp_path / "a.jsonl", "--output", tmp_path / "out")
    for more, message in [
        (("--without", "c5"), "no such rule"),
        (("--ngram", "0"), "--ngram"),
        (("--decontaminate", tmp_path / "a.jsonl"), "no string in it has 12 words"),
    ]:
        result = clean(*flags, *more)
        assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1
