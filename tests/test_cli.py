"""Every mistake on a command line is one line that names the flag; --help is for people."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from minimind.cli import parse_flags, parse_known_flags
from minimind.errors import UserError


@dataclasses.dataclass(frozen=True)
class Flags:
    """Do something."""

    output: Path
    """Where to write."""
    steps: int = 3
    """How often."""
    rate: float | None = None
    """How fast."""
    betas: tuple[float, float] | None = None
    """Two numbers."""
    kind: Literal["plain", "fancy"] = "plain"
    """How."""
    loud: bool = False
    """Say more."""


def parse(*args: str) -> Flags:
    return parse_flags(Flags, args, default=tyro.MISSING_NONPROP, prog="python -m thing")


def test_flags_become_fields():
    flags = parse("--output", "here", "--rate", "1e-3", "--betas", "0.9", "0.99", "--loud", "--kind=fancy")
    assert flags == Flags(Path("here"), rate=1e-3, betas=(0.9, 0.99), loud=True, kind="fancy")
    assert parse("--output", "here", "--steps", "1", "--steps", "2").steps == 2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--output", "x", "--stesp", "3"], "unknown flag --stesp; did you mean '--steps'?"),
        (["--output", "x", "--stesp=3"], "unknown flag --stesp; did you mean '--steps'?"),
        (["--output", "x", "--zzzz"], "unknown flag --zzzz"),
        (["--output", "x", "-z"], "unknown flag -z"),
        (["--output", "x", "stray"], "unexpected argument 'stray'"),
        (["--output", "x", "--loud", "yes"], "unexpected argument 'yes'"),
        ([], "missing --output"),
        (["--stesp", "3"], "unknown flag --stesp; missing --output"),
        (["--output"], "--output: a value is missing"),
        (["--output", "x", "--steps"], "--steps: a value is missing"),
        (["--output", "x", "--steps", "1.5"], "--steps: '1.5' is not INT"),
        (["--output", "x", "--rate", "fast"], "--rate: 'fast' is not FLOAT"),
        (["--output", "x", "--rate="], "--rate: '' is not FLOAT"),
        (["--output", "x", "--betas", "0.9"], "--betas: '0.9' is not FLOAT FLOAT"),
        (["--output", "x", "--betas", "0.9,0.95"], "--betas: '0.9,0.95' is not FLOAT FLOAT"),
        (["--output", "x", "--kind", "odd"], "--kind: 'odd' is not one of fancy, plain"),
    ],
)
@pytest.mark.parametrize("columns", ["20", "200"])
def test_a_mistake_is_one_line_on_any_terminal(monkeypatch, capsys, args, words, columns):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(UserError) as error:
        parse(*args)
    assert str(error.value) == f"{words} (flags: python -m thing --help)"
    assert capsys.readouterr() == ("", "")


def test_a_mistake_in_what_nobody_foresaw_is_still_one_line(monkeypatch):
    """A page of tyro's that names no flag, of a kind that is not known here."""

    def refuse(*_: object, **__: object) -> None:
        print("╭─ Odd ────╮\n│ two      │\n│ lines    │\n├──────────┤\n│ hint     │\n╰──────────╯", file=sys.stderr)
        sys.exit(2)

    monkeypatch.setattr(tyro, "cli", refuse)
    with pytest.raises(UserError, match=r"^two lines \(flags: python -m thing --help\)$"):
        parse("--output", "x")


@dataclasses.dataclass(frozen=True)
class Add:
    """Add."""

    path: tyro.conf.Positional[Path]
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Drop:
    """Drop."""

    output: Path


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["add", "x", "--cuont", "2"], r"unknown flag --cuont; did you mean '--count'\?"),
        (["add", "x", "--count", "two"], "--count: 'two' is not INT"),
        (["add"], "Missing .*PATH"),
        (["drop"], "missing --output"),
        (["dorp"], ".*drop"),
        ([], ".*add.*drop"),
    ],
)
def test_a_mistake_in_a_subcommand_is_one_line(args, words):
    commands = Annotated[Add, tyro.conf.subcommand("add")] | Annotated[Drop, tyro.conf.subcommand("drop")]
    with pytest.raises(UserError, match=f"^{words}.* \\(flags: thing --help\\)$") as error:
        parse_flags(commands, args, prog="thing")
    assert "\n" not in str(error.value)


def test_help_names_the_command_each_flag_and_its_default(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse("--help")
    assert not exit_.value.code
    text = capsys.readouterr().out
    assert text.startswith("usage: python -m thing")
    for word in ("Do something.", "--output", "Where to write.", "--steps INT", "(default: 3)"):
        assert word in text


def test_known_flags_pass_over_the_others():
    args = ["--help", "--output", "x", "--stesp", "3", "--rate", "0.5"]
    assert parse_known_flags(Flags, args, default=Flags(Path("y"))) == Flags(Path("x"), rate=0.5)
    with pytest.raises(UserError, match="--rate: 'fast' is not FLOAT"):
        parse_known_flags(Flags, ["--rate", "fast"], default=Flags(Path("y")))
