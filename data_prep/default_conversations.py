"""Conversations that every machine can make: python -m data_prep.default_conversations --output FOLDER.

Arithmetic and word questions in English and Chinese by a seeded generator, and questions about the documentation inside
Python. Questions that are held out are never trained on, in neither language: by them it shows whether a model has
learnt the rule.
"""

import ast
import json
import random
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from data_prep.default_corpus import parse_source, read_source
from minimind.cli import parse_flags
from minimind.errors import UserError, run_main
from minimind.files import disk_errors, replace_file
from minimind.schema import AT_LEAST_1, Limits, check_fields

TRAINING_NAME, HELD_OUT_NAME = "conversations.jsonl", "held_out.jsonl"
_MODULES = ("shutil", "glob", "textwrap", "copy", "bisect", "heapq", "fnmatch", "tempfile", "filecmp")
"""Modules of the standard library that are written in Python, with functions that people use."""
_SHOWN = "`shutil.copy2`"
"""The function whose question stands among those to be asked."""
_LONGEST_SENTENCE = 120
_QUALITIES = (
    *(("red", "红"), ("blue", "蓝"), ("green", "绿"), ("white", "白"), ("black", "黑"), ("big", "大"), ("small", "小")),
    *(("old", "老"), ("new", "新"), ("good", "好"), ("long", "长"), ("short", "短"), ("cold", "冷"), ("hot", "热")),
    *(("light", "轻"), ("heavy", "重"), ("fast", "快"), ("slow", "慢"), ("soft", "软"), ("hard", "硬")),
)
_THINGS = (
    *(("cat", "猫"), ("dog", "狗"), ("bird", "鸟"), ("fish", "鱼"), ("tree", "树"), ("house", "房"), ("road", "路")),
    *(("door", "门"), ("book", "书"), ("fire", "火"), ("stone", "石"), ("river", "河"), ("car", "车"), ("ship", "船")),
    *(("flower", "花"), ("lamp", "灯"), ("hand", "手"), ("tea", "茶"), ("shoe", "鞋"), ("clock", "钟")),
)


class Question(NamedTuple):
    """A question and its one right answer; `content` is the same for both languages."""

    content: tuple[Any, ...]
    english: tuple[str, str]
    chinese: tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class DefaultConversationsFlags:
    """Make conversations for fine-tuning from simple rules and from Python's own documentation."""

    output: Path
    """Folder for conversations.jsonl and held_out.jsonl."""
    count: Annotated[int, AT_LEAST_1] = 20_000
    """Conversations to train on, of one to three questions each."""
    held_out: Annotated[int, Limits(at_least=0, at_most=200)] = 100
    """Questions of the simplest kind that are held out, in English and Chinese by turns; of the others a fifth."""
    seed: int = 0
    """Of the generator: the same one gives the same questions."""
    overwrite: bool = False
    """Replace files that are there."""

    def __post_init__(self) -> None:
        check_fields(DefaultConversationsFlags, vars(self))


def main() -> None:
    flags = parse_flags(
        DefaultConversationsFlags,
        sys.argv[1:],
        default=tyro.MISSING_NONPROP,
        prog="python -m data_prep.default_conversations",
    )
    training, held_out = flags.output / TRAINING_NAME, flags.output / HELD_OUT_NAME
    if training.exists() and not flags.overwrite:
        raise UserError(f"{training} already exists: choose another --output or give --overwrite")
    draw = random.Random(flags.seed)
    simplest = next(iter(KINDS))
    kept = {
        kind: hold_out(draw, make, flags.held_out if kind == simplest else flags.held_out // 5)
        for kind, make in KINDS.items()
    }
    documented = list(ask_documentation())
    conversations = [make_conversation(draw, kept, documented) for _ in range(flags.count)]
    questions = [
        {"messages": make_turn(*question[1 + place % 2]), "kind": kind, "is_held_out": True}
        for kind, found in kept.items()
        for place, question in enumerate(found.values())
    ]
    # What is known by heart cannot be held out.
    questions += [
        {"messages": make_turn(text, answer), "kind": _DOCUMENTATION, "is_held_out": False}
        for text, answer in documented
        if _SHOWN in text
    ]
    with disk_errors(flags.output):
        flags.output.mkdir(parents=True, exist_ok=True)
        replace_file(held_out, _lines(questions))
        replace_file(training, _lines([make_record(messages) for messages in conversations]))
    print(
        f"{training}: {len(conversations):,} conversations; {held_out}: {sum(map(len, kept.values())):,} questions "
        "that are never trained on"
    )


def hold_out(
    draw: random.Random, make: Callable[[random.Random], Question], count: int
) -> dict[tuple[Any, ...], Question]:
    """So many different questions, by their content."""
    found: dict[tuple[Any, ...], Question] = {}
    while len(found) < count:
        question = make(draw)
        found[question.content] = question
    return found


def make_conversation(
    draw: random.Random,
    held_out: dict[str, dict[tuple[Any, ...], Question]],
    documented: list[tuple[str, str]],
) -> list[dict[str, str]]:
    """One to three questions with their answers, none of them held out."""
    messages: list[dict[str, str]] = []
    for _ in range(draw.randint(1, 3)):
        kind = draw.choice([*["words"] * 3, *KINDS, *[_DOCUMENTATION] * 2] if documented else [*KINDS])
        text, answer = draw.choice(documented) if kind == _DOCUMENTATION else ("", "")
        while not text:
            question = KINDS[kind](draw)
            if question.content not in held_out[kind]:
                text, answer = draw.choice([question.english, question.chinese])
        messages += make_turn(text, answer)
    return messages


def make_record(messages: list[dict[str, str]]) -> dict[str, Any]:
    """A line of the file: the conversation, and its bare text, from which a tokenizer learns the words."""
    return {"messages": messages, "text": "\n".join(message["content"] for message in messages)}


def make_turn(question: str, answer: str) -> list[dict[str, str]]:
    """The messages of a question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def ask_documentation() -> Iterator[tuple[str, str]]:
    """(question, first sentence of the docstring) of functions of the standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    for module in _MODULES:
        tree = parse_source(read_source(library / f"{module}.py"))
        for node in tree.body if tree else []:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                sentence = first_sentence(ast.get_docstring(node) or "")
                if sentence:
                    yield f"What does `{module}.{node.name}` do?", sentence


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring; empty if there is none of ordinary length."""
    text = " ".join(docstring.split("\n\n")[0].split())
    match = re.match(r"[A-Z].*?[a-z`)]\.(?= |\Z)", text)
    return match[0] if match and len(match[0]) <= _LONGEST_SENTENCE else ""


def _ask_words(draw: random.Random) -> Question:
    quality, thing = draw.choice(_QUALITIES), draw.choice(_THINGS)
    english, chinese = (f"{quality[0]} {thing[0]}", quality[1] + thing[1])
    return Question(
        (english,),
        (f"What is {english} in Chinese?", chinese),
        (f"{chinese}用英语怎么说？", english),
    )


def _ask_sum(draw: random.Random) -> Question:
    first, second = draw.randint(0, 20), draw.randint(0, 20)
    answer = str(first + second)
    return Question(
        tuple(sorted((first, second))),
        (f"What is {first} plus {second}?", answer),
        (f"{first} 加 {second} 等于几？", answer),
    )


def _ask_next(draw: random.Random) -> Question:
    number = draw.randint(100, 998)
    return Question(
        (number,),
        (f"What number comes after {number}?", f"{number + 1}"),
        (f"{number} 的下一个数是几？", f"{number + 1}"),
    )


KINDS: dict[str, Callable[[random.Random], Question]] = {
    "words": _ask_words,
    "sum": _ask_sum,
    "next": _ask_next,
}
"""What is asked by a rule, the simplest first."""
_DOCUMENTATION = "documentation"


def _lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


if __name__ == "__main__":
    run_main(main)
