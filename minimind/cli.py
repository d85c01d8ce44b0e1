"""Command-line flags from dataclasses, through tyro, with errors of one line.

tyro prints a framed page for a mistake; only the name of the flag is taken from it, so the errors do not depend on its
wording. They become one `UserError`, which `errors.run_main` prints and turns into exit code 2.
"""

import contextlib
import dataclasses
import io
import itertools
import os
import sys
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro

from minimind.errors import UserError
from minimind.schema import nearest

T = TypeVar("T")


def parse_flags(cls: type[T], args: Sequence[str], *, default: T | None = None, prog: str | None = None) -> T:
    """Parse `args` into the dataclass `cls` (or a union of subcommands); `--help` prints and exits with code 0.

    Args:
        prog: how the command is called, for the help and the errors.

    Raises:
        UserError: an unknown flag, a missing or a wrong value, naming the flag and the nearest one.
    """
    parsed, unknown = _parse(cls, args, default, prog)
    if unknown:
        raise _error(_unknown(unknown[0], list(_flags_of(cls))), prog)
    return parsed


def parse_known_flags(cls: type[T], args: Sequence[str], *, default: T, prog: str | None = None) -> T:
    """`parse_flags`, ignoring flags that `cls` does not have (`--help` too)."""
    return _parse(cls, [arg for arg in args if arg not in ("-h", "--help")], default, prog)[0]


def without_local_rank(args: Sequence[str]) -> list[str]:
    """`args` without the --local_rank=N that the deepspeed launcher adds; the environment has it too."""
    return [arg for arg in args if not arg.startswith(("--local_rank=", "--local-rank="))]


def _parse(cls: type[T], args: Sequence[str], default: T | None, prog: str | None) -> tuple[T, list[str]]:
    """The parsed flags, and the words that are none of them."""
    given: Any = tyro.MISSING if default is None else default
    page = io.StringIO()
    capture = contextlib.ExitStack()
    if not any(arg in ("-h", "--help") for arg in args):
        capture.enter_context(contextlib.redirect_stdout(page))
        capture.enter_context(contextlib.redirect_stderr(page))
        capture.enter_context(_wide_terminal())
    try:
        with capture:
            return tyro.cli(cls, args=args, prog=prog, default=given, return_unknown_args=True)
    except SystemExit as error:
        if not error.code:
            raise
    raise _error(_explain(cls, args, default, page.getvalue()), prog)


@contextlib.contextmanager
def _wide_terminal() -> Any:
    """tyro wraps its page to the terminal, in the middle of a flag too."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _error(message: str, prog: str | None) -> UserError:
    program = prog or sys.argv[0].rsplit("/", 1)[-1]
    return UserError(f"{message} (flags: {program} --help)")


def _unknown(word: str, known: list[str]) -> str:
    if not word.startswith("-"):
        return f"unexpected argument '{word}'"
    name = word.split("=")[0]
    return f"unknown flag {name}{nearest(name, known)}"


def _explain(cls: Any, args: Sequence[str], default: object, page: str) -> str:
    """Why tyro refused `args`: the first flag of them that its page names, or the flags that are missing."""
    known = _flags_of(cls)
    given = [_name(arg) for arg in args]
    named = [word.strip("'\"`:.,") for word in page.split()]
    for name in named:
        if name in known and name in given:
            return _explain_value(name, args, known[name])
    if dataclasses.is_dataclass(cls) and default in (None, tyro.MISSING_NONPROP):
        required = [
            field for field in dataclasses.fields(cls) if field.default is field.default_factory
        ]  # both missing
        missing = [name for name in map(_flag, required) if name in named and name not in given]
        if missing:
            unknown = [name for name in given if name.startswith("--") and name not in known]
            return "; ".join([*(f"unknown flag {name}" for name in unknown), f"missing {', '.join(missing)}"])
    lines = [line.strip(" │|") for line in page.splitlines()[1:]]
    is_text = [any(char.isalnum() for char in line) for line in lines]
    begin = is_text.index(True) if True in is_text else len(lines)
    paragraph = itertools.takewhile(lambda i: is_text[i], range(begin, len(lines)))
    return " ".join(lines[i] for i in paragraph) or "the command line could not be read"


def _explain_value(name: str, args: Sequence[str], hint: Any) -> str:
    last = max(i for i, arg in enumerate(args) if _name(arg) == name)
    _, equals, value = args[last].partition("=")
    after = itertools.takewhile(lambda arg: not arg.startswith("--"), args[last + 1 :])
    values = [value] if equals else list(after)
    if not values:
        return f"{name}: a value is missing"
    return f"{name}: {' '.join(map(repr, values))} is not {_describe(hint)}"


def _describe(hint: Any) -> str:
    """`float | None` -> FLOAT, `tuple[float, float]` -> FLOAT FLOAT, `Literal["b", "a"]` -> one of a, b."""
    parts = [part for part in get_args(hint) if part is not type(None)]
    if get_origin(hint) is Literal:
        return f"one of {', '.join(sorted(map(str, parts)))}"
    if parts:
        return " ".join(map(_describe, parts))
    return str(getattr(hint, "__name__", hint)).upper()


def _name(word: str) -> str:
    """The flag of `--flag=value` or `--a_flag`."""
    return word.split("=")[0].replace("_", "-")


def _flag(field: Any) -> str:
    return "--" + field.name.replace("_", "-")


def _flags_of(cls: Any) -> dict[str, Any]:
    """Each flag and its type; those of nested dataclasses and of subcommands are flat."""
    if not dataclasses.is_dataclass(cls):
        members = [getattr(member, "__origin__", member) for member in get_args(cls)]
        return {name: hint for member in members for name, hint in _flags_of(member).items()}
    flags: dict[str, Any] = {}
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        flags |= _flags_of(hint) if dataclasses.is_dataclass(hint) else {_flag(field): hint}
    return flags
