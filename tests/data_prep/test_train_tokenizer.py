"""Training a tokenizer: the traps of SentencePiece, determinism, sampling, the command."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers_for_tests import save_byte_level, save_sentencepiece

from data_prep.train_tokenizer import cut_sentences, main, sample_sentences, save_tokenizer, train_tokenizer
from minimind.data.tokenizer import BLANK, CONTENT_MARKS, SPECIAL_TOKENS, Tokenizer, load_tokenizer
from minimind.errors import UserError

ENGLISH = "The cat sat on the mat, and the dog sat on the log.\n\n    They were 12345 days old.\n" * 20


def train(documents: list[str], folder: Path, vocab_size: int = 320) -> Tokenizer:
    save_tokenizer(train_tokenizer(list(cut_sentences(documents)), vocab_size), folder)
    return load_tokenizer(folder)


def run(*flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_prep.train_tokenizer", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_vocabulary_has_the_asked_size_and_learns_words(tmp_path: Path) -> None:
    tokenizer = train([ENGLISH], tmp_path)
    assert tokenizer.vocab_size == 320
    assert len(tokenizer.encode(" the")) == 1
    assert len(tokenizer.encode(".\n")) == 1
    assert len(tokenizer.encode("12345")) == 5  # each digit by itself
    assert len(tokenizer.encode("at,")) == 2
    save_tokenizer(train_tokenizer(list(cut_sentences([ENGLISH])), 320, False, False), tmp_path)
    joined = load_tokenizer(tmp_path)
    assert len(joined.encode("12345")) < 5 and len(joined.encode("at,")) == 1


@pytest.mark.parametrize(
    "document",
    [
        "你好世界今天天气很好" * 30,  # no space: the piece for it must be there all the same
        f"{BLANK}{BLANK}the mark {BLANK} of a space " * 30,
        "\u2585 the unknown mark of the library " * 30,
        "nul \0 and tab \t and <0x41> <0xFF> <unk> as text " * 30,
        "<|im_start|>user\n<|im_end|>\n<|endoftext|> the words between " * 30,
        "x" * 20_000 + " a line longer than the library takes " * 30,
        "\r\n".join(["dos lines"] * 50),
        "".join(chr(0x4E00 + i) for i in range(5000)) + "more characters than tokens " * 30,
    ],
)
def test_any_training_text_gives_an_exact_tokenizer(tmp_path: Path, document: str) -> None:
    tokenizer = train([document], tmp_path, 295)
    for text in (document, ENGLISH, " ", f" {BLANK} \u2585\0\t"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode(text, allow_special=False)) == text


def test_special_tokens_are_not_learnt_as_text(tmp_path: Path) -> None:
    tokenizer = train(["<|im_start|>user says<|im_end|>\n" * 50 + ENGLISH], tmp_path)
    learnt = set(range(3, tokenizer.vocab_size)) - {*tokenizer.mark_ids.values()}
    pieces = [tokenizer.token_bytes(i).decode("utf-8", "replace") for i in learnt]
    assert not any("<|" in piece or "|>" in piece for piece in pieces)


def test_marks_of_tools_and_thinking_are_reserved(tmp_path: Path) -> None:
    tokenizer = train([ENGLISH], tmp_path)
    assert tokenizer.special_ids == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert tokenizer.mark_ids == {mark: place for place, mark in enumerate(CONTENT_MARKS, 4)}
    text = "<think>the cat</think><tool_call><|buffer9|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len({*ids} & {*tokenizer.mark_ids.values()}) == 4
    plain = tokenizer.encode(text, allow_special=False)
    assert tokenizer.decode(plain) == text and not {*plain} & {*tokenizer.mark_ids.values()}


def test_a_text_cut_behind_a_line_break_has_the_ids_of_the_whole(tmp_path: Path) -> None:
    tokenizer = train(["assistant\n- one\n- two\n\n(three)\r\n\tx\n" * 50 + ENGLISH], tmp_path, 400)
    assert all(b"\n" not in tokenizer.token_bytes(token)[:-1] for token in range(tokenizer.vocab_size))
    for answer in ("- one", "\n- two", "(three)", "<think>", " x", "\tx", "."):
        assert tokenizer.encode("assistant\n" + answer) == tokenizer.encode("assistant\n") + tokenizer.encode(answer)


@pytest.mark.parametrize("kind", [save_sentencepiece, save_byte_level])
def test_a_tokenizer_grows_by_tokens_behind_its_own(
    tmp_path: Path, kind: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = kind(tmp_path / "old")
    (old.parent / "chat_template.jinja").write_text("mine")

    def grow(*tokens: str) -> None:
        flags = ["--tokenizer", old, "--output", tmp_path / "new", "--add-special-token", *tokens]
        monkeypatch.setattr(sys, "argv", ["train_tokenizer", *map(str, flags)])
        main()

    before = load_tokenizer(old)
    first, second = before.vocab_size, before.vocab_size + 1
    grow("<|fim|>", "<|a b|>")
    assert f"<|fim|> is id {first}, <|a b|> is id {second}" in capsys.readouterr().out
    after = load_tokenizer(tmp_path / "new")
    assert after.vocab_size == second + 1 and after.mark_ids == before.mark_ids
    assert after.special_ids == before.special_ids | {"<|fim|>": first, "<|a b|>": second}
    assert after.encode("the<|fim|> fox<think>") == [*before.encode("the"), first, *before.encode(" fox<think>")]
    assert after.encode("<|fim|>", allow_special=False) == before.encode("<|fim|>")
    assert (tmp_path / "new/chat_template.jinja").read_text() == "mine"
    with pytest.raises(UserError, match="already exists"):
        grow("<|fim|>")
    shutil.rmtree(tmp_path / "new")
    for tokens in (["<|im_end|>"], ["<|fim|>", "<|fim|>"]):
        with pytest.raises(UserError, match=r"has this token already"):
            grow(*tokens)
    assert not (tmp_path / "new").exists()


def test_same_text_gives_the_same_bytes() -> None:
    sentences = list(cut_sentences([ENGLISH, "另一个文档"]))
    assert train_tokenizer(sentences, 320) == train_tokenizer(sentences, 320)


def test_too_large_a_vocabulary_and_no_text_are_user_errors() -> None:
    with pytest.raises(UserError, match=r"--vocab-size 6400 is too large .* at most \d+"):
        train_tokenizer(["the cat sat on the mat and thought of other things"], 6400)
    with pytest.raises(UserError, match="too little text to train a tokenizer on"):
        train_tokenizer(["a"], 6400)
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([], 320)
    with pytest.raises(UserError, match="no text"):
        train_tokenizer(["\n"], 320)


def test_sentences_hold_all_text_but_the_special_tokens() -> None:
    document = ENGLISH + "<|endoftext|>" + "长" * 10_000
    sentences = list(cut_sentences([document]))
    assert "".join(sentences) == document.replace(SPECIAL_TOKENS[0], "")
    assert max(map(len, sentences)) <= 4000


def test_sample_is_bounded_and_depends_on_the_sentences_alone() -> None:
    sentences = [f"sentence number {i}, of some length" for i in range(5000)]
    sample = sample_sentences(sentences, 40_000)
    assert 15_000 < sum(map(len, sample)) <= 40_000
    assert sorted(sample_sentences(reversed(sentences), 40_000)) == sorted(sample)
    assert sample == [s for s in sentences if s in set(sample)]
    assert sample_sentences(sentences, 10**9) == sentences


def test_command_writes_model_and_description(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps({"body": ENGLISH}) + "\n")
    flags = ("--input", source, "--output", tmp_path / "tok", "--vocab-size", 300, "--text-field", "body")
    first = run(*flags)
    assert first.returncode == 0, first.stderr
    tokenizer = load_tokenizer(tmp_path / "tok")
    config = json.loads((tmp_path / "tok" / "tokenizer_config.json").read_text())
    assert config["vocab_size"] == tokenizer.vocab_size == 300
    assert config["special_tokens"] == tokenizer.special_ids | tokenizer.mark_ids
    assert {file.name for file in (tmp_path / "tok").iterdir()} == {"tokenizer.model", "tokenizer_config.json"}

    second = run(*flags)
    assert second.returncode == 2
    assert "--overwrite" in second.stderr and "Traceback" not in second.stderr
    before = (tmp_path / "tok" / "tokenizer.model").read_bytes()
    assert run(*flags, "--overwrite").returncode == 0
    assert (tmp_path / "tok" / "tokenizer.model").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--input", "absent.jsonl"), "absent.jsonl does not exist"),
        (("--input", __file__), "no known format"),
        ((), "give either --input"),
        (("--tokenizer", "absent"), "name the tokens"),
        (
            ("--input", "{tmp}/a.jsonl", "--vocab-size", "100"),
            "--vocab-size: 100 is not a finite number of 279 or more",
        ),
        (("--input", "{tmp}/a.jsonl", "--output", "{tmp}/a.jsonl/tok", "--vocab-size", "290"), "cannot write"),
        (
            ("--input", "{tmp}/a.jsonl", "--max-train-bytes", "-1"),
            "--max-train-bytes: -1 is not a finite number of 1 or more",
        ),
        (
            ("--input", "{tmp}/a.jsonl", "--max-bad-fraction", "-1"),
            "--max-bad-fraction: -1.0 is not a number from 0 to 1",
        ),
        (("--input", "{tmp}/a.jsonl", "--text-field", "body"), "above --max-bad-fraction"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "the cat sat on the mat, the cat sat"}\n')
    result = run("--output", tmp_path / "tok", *(flag.format(tmp=tmp_path) for flag in flags))
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "tok").exists()
