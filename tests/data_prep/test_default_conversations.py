"""Conversations that every machine can make: rules, what is held out, Python's own documentation."""

import json
import random
import re
import sys
from pathlib import Path

import pytest

from data_prep.default_conversations import KINDS, ask_documentation, first_sentence, main
from minimind.data.conversations import find_conversation
from minimind.errors import UserError


def make(monkeypatch: pytest.MonkeyPatch, output: Path, *flags: str) -> tuple[list[dict], list[dict]]:
    monkeypatch.setattr(sys, "argv", ["default_conversations", "--output", str(output), "--count", "300", *flags])
    main()
    return tuple(
        [json.loads(line) for line in (output / name).read_text().splitlines()]
        for name in ("conversations.jsonl", "held_out.jsonl")
    )  # type: ignore[return-value]


def test_what_is_held_out_is_never_trained_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    training, held_out = make(monkeypatch, tmp_path / "a")
    assert len(training) == 300 and all(find_conversation(record) for record in training)
    asked = {record["messages"][0]["content"] for record in held_out if record["is_held_out"]}
    simplest = [record for record in held_out if record["kind"] == next(iter(KINDS))]
    assert len(simplest) == 100 and len(asked) == 100 + 20 * (len(KINDS) - 1)
    trained = {message["content"] for record in training for message in record["messages"]}
    assert not asked & trained
    # Neither the other way round: what is held out stands in no answer.
    answers = {record["messages"][1]["content"] for record in simplest}
    assert len(answers) == 100 and not answers & trained
    (shown,) = [record for record in held_out if not record["is_held_out"]]
    assert "`shutil.copy2`" in shown["messages"][0]["content"] and shown["messages"][1]["content"].endswith(".")


def test_a_seed_gives_the_same_files_and_another_gives_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = make(monkeypatch, tmp_path / "a")
    with pytest.raises(UserError, match="already exists"):
        make(monkeypatch, tmp_path / "a")
    assert make(monkeypatch, tmp_path / "b") == first
    assert make(monkeypatch, tmp_path / "a", "--seed", "1", "--overwrite") != first


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_right(kind: str) -> None:
    draw = random.Random(0)
    for _ in range(50):
        question = KINDS[kind](draw)
        for text, answer in (question.english, question.chinese):
            numbers = [int(number) for number in re.findall("[0-9]+", text)]
            assert kind != "next" or int(answer) == numbers[0] + 1
            assert kind != "sum" or int(answer) == sum(numbers)
        if kind == "words":
            (english, chinese), (given, back) = question.english, question.chinese
            assert given.startswith(chinese) and back in english and len(back.split()) == len(chinese) == 2


def test_documentation_is_the_first_sentence_of_functions() -> None:
    asked = dict(ask_documentation())
    assert len(asked) > 30
    assert asked["What does `shutil.copy2` do?"].startswith("Copy data and metadata.")
    assert first_sentence("Do it.  More.\n\nEven more.") == "Do it."
    assert first_sentence("no sentence") == first_sentence("Very " + "long " * 50 + "one.") == ""
