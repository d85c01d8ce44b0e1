"""Questions from a file and answers into one, written so that an interruption at any moment loses none.

An answer is appended to a journal as soon as it is complete; the answers in the order of the questions become the file
when all are there.
"""

import errno
import fcntl
import json
import os
from collections.abc import Iterator, KeysView
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from minimind.data.conversations import find_question
from minimind.errors import UserError, first_line
from minimind.files import PARTIAL_SUFFIX, disk_errors, new_file, read_json, write_json

RESPONSE = "response"


class Question(NamedTuple):
    """A line of the input."""

    number: int
    record: dict[str, Any]
    messages: list[dict[str, Any]]
    tools: Any


def read_questions(file: Path, expect: str | None = None) -> Iterator[Question]:
    """The conversations of a file of JSON lines, each up to where the assistant answers.

    Args:
        expect: the field with the expected answer, which each must have.

    Raises:
        UserError: the file cannot be read, or a line holds no question (naming it).
    """
    try:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        record = json.loads(line)
                        question = Question(number, record, **find_question(record))
                        if RESPONSE in record:
                            raise UserError(f"has a field {RESPONSE!r}, in which the answer would be written")
                        if expect is not None:
                            expected_answer(record, expect)
                    except (UserError, ValueError, RecursionError) as error:
                        kind = "" if isinstance(error, UserError) else "no JSON: "
                        raise UserError(f"{file} line {number}: {kind}{first_line(error)}") from None
                    yield question
    except OSError as error:
        raise UserError(f"input {file}: {error.strerror or error}; give a readable file of JSON lines") from None


def expected_answer(record: dict[str, Any], field: str) -> str:
    """What the record expects: a text, a number, or the last message of a conversation.

    Raises:
        UserError: the field is absent, or something else.
    """
    value = record.get(field)
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content", value[-1].get("value"))
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        what = f"is {type(value).__name__}" if field in record else "is missing"
        raise UserError(f"field {field!r} {what}: it must hold the expected answer")
    return str(value).strip()


def count_exact_matches(file: Path, field: str) -> tuple[int, int]:
    """How many of the answers in a complete file are the expected ones, but for white space around them, and of how
    many."""
    records = [json.loads(line) for line in file.read_bytes().splitlines()]
    hits = sum(record[RESPONSE]["content"].strip() == expected_answer(record, field) for record in records)
    return hits, len(records)


class AnswerFile:
    """The answers to a file of questions; a context that keeps other processes out.

    Args:
        settings: what decides the answers; a file that was begun with others is refused.

    Raises:
        UserError: the file exists and is not of this command, is being written by another process, or cannot be.
    """

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self.file = file
        self._settings_file = file.with_name(f"{file.name}.settings.json")
        self._journal_file = file.with_name(file.name + PARTIAL_SUFFIX)
        self._places: dict[int, tuple[int, int]] = {}  # of each answer: its place in the journal and its bytes
        self._settings = json.loads(json.dumps(settings))
        self._check_settings()
        with disk_errors(file, "; give another --output"):
            file.parent.mkdir(parents=True, exist_ok=True)
            self._journal = open(self._journal_file, "a+b", buffering=0)  # noqa: SIM115 - closed by __exit__
        self._lock()
        if not self.is_complete:
            with disk_errors(self._settings_file, "; give another --output"):
                write_json(self._settings_file, self._settings)
            self._read_journal()

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self.is_complete or not self._places:
            self._journal_file.unlink(missing_ok=True)
        if not (self.is_complete or self._places):
            self._settings_file.unlink(missing_ok=True)
        self._journal.close()

    @property
    def is_complete(self) -> bool:
        """Whether all answers are there."""
        return self.file.exists()

    @property
    def numbers(self) -> KeysView[int]:
        """The questions that have been answered."""
        return self._places.keys()

    def add(self, question: Question, response: dict[str, Any]) -> None:
        """Keep the answer to a question, with what else is to be said of it."""
        line = json.dumps({**question.record, **response}, ensure_ascii=False)
        # In a string of JSON a lone surrogate may stand as the escape that this writes.
        data = f"{question.number}\t{line}\n".encode("utf-8", "backslashreplace")
        with disk_errors(self._journal_file, "; the same command continues"):
            if self._journal.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        start = self._journal.tell() - len(data)
        self._places[question.number] = (start, len(data))

    def publish(self) -> None:
        """All questions are answered: write the file."""
        with (
            disk_errors(self.file, "; the same command continues"),
            new_file(self.file) as temporary,
            open(temporary, "wb") as output,
        ):
            for number in sorted(self._places):
                start, length = self._places[number]
                self._journal.seek(start)
                output.write(self._journal.read(length).split(b"\t", 1)[1])

    def _check_settings(self) -> None:
        if self._settings_file.exists():
            before = read_json(self._settings_file, "settings of the answers")
            for name, value in self._settings.items():
                if before.get(name) != value:
                    raise UserError(
                        f"output {self.file} was begun with {name} {before.get(name)}, not {value}: give another "
                        f"--output, or delete what is there ({self.file.name}*)"
                    )
        elif self.is_complete:
            raise UserError(f"output {self.file} exists and is not of this command: give another --output")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.fstat(self._journal.fileno()).st_nlink > 0  # else its last owner has just removed it
        except BlockingIOError:
            held = False
        except OSError:
            held = True  # a file system without locks
        if not held:
            self._journal.close()
            raise UserError(f"output {self.file} is being written by another process")

    def _read_journal(self) -> None:
        """Find the answers that are kept; what the end of a process cut off, or that of a machine lost, goes."""
        start = 0
        with open(self._journal_file, "rb") as lines:
            for line in lines:
                number = line.split(b"\t", 1)[0]
                if not (line.endswith(b"\n") and number.isdigit()):
                    break
                self._places[int(number)] = (start, len(line))
                start += len(line)
        self._journal.truncate(start)
