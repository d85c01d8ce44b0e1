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
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro

from minimind.errors import UserError
from minimind.schema import nearest

T = TypeVar("T")


def parse_flags(
    cls: type[T], args: Sequence[str] | None, *, default: Any = tyro.MISSING_NONPROP, prog: str | None = None
) -> T:
    """Parse flags into the dataclass `cls` (or a union of subcommands); `--help` prints and exits with code 0.

    Args:
        args: the command line without the program's name; None: that of this process.
        default: an instance with the values of flags that are not given; by default the fields' own.
        prog: how the command is called, for the help and the errors.

    Raises:
        UserError: an unknown flag, a missing or a wrong value, naming the flag and the nearest one.
    """
    parsed, unknown = _parse(cls, sys.argv[1:] if args is None else args, default, prog)
    if unknown:
        name = unknown[0].split("=")[0]
        is_flag = name.startswith("-")
        known = list(_flags_of(cls))
        message = f"unknown flag {name}{nearest(name, known)}" if is_flag else f"unexpected argument '{unknown[0]}'"
        raise _error(message, prog)
    return parsed


def parse_known_flags(cls: type[T], args: Sequence[str], *, default: T, prog: str | None = None) -> T:
    """`parse_flags`, ignoring flags that `cls` does not have (`--help` too)."""
    return _parse(cls, [arg for arg in args if arg not in ("-h", "--help")], default, prog)[0]


def without_local_rank(args: Sequence[str] | None) -> list[str]:
    """`args` (None: those of this process) without the --local_rank=N that the deepspeed launcher adds; the environment
    has it too."""
    given = sys.argv[1:] if args is None else args
    return [arg for arg in given if not arg.startswith(("--local_rank=", "--local-rank="))]


def _parse(cls: type[T], args: Sequence[str], default: Any, prog: str | None) -> tuple[T, list[str]]:
    """The parsed flags, and the words that are none of them."""
    page = io.StringIO()
    capture = contextlib.ExitStack()
    if not any(arg in ("-h", "--help") for arg in args):
        capture.enter_context(contextlib.redirect_stdout(page))
        capture.enter_context(contextlib.redirect_stderr(page))
        capture.enter_context(_wide_terminal())
    try:
        with capture:
            return tyro.cli(cls, args=args, prog=prog, default=default, return_unknown_args=True)
    except SystemExit as error:
        if not error.code:
            raise
    raise _error(_explain(cls, args, page.getvalue()), prog)


@contextlib.contextmanager
def _wide_terminal() -> Iterator[None]:
    """tyro wraps its page to the terminal, in the middle of a flag too."""
    before = dict(os.environ)
    os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        os.environ.pop("COLUMNS")
        os.environ.update(before)


def _error(message: str, prog: str | None) -> UserError:
    program = prog or sys.argv[0].rsplit("/", 1)[-1]
    return UserError(f"{message} (flags: {program} --help)")


def _explain(cls: Any, args: Sequence[str], page: str) -> str:
    """Why tyro refused `args`: the first flag of them that its page names, or the flags that are missing."""
    known = _flags_of(cls)
    given = [_name(arg) for arg in args]
    named = [name for word in page.split() if (name := word.strip("'\"`:.,")) in known]
    for name in named:
        if name in given:
            return _explain_value(name, args, known[name])
    if named:
        unknown = [f"unknown flag {name}" for name in given if name.startswith("--") and name not in known]
        return "; ".join([*unknown, f"missing {', '.join(dict.fromkeys(named))}"])

    def is_frame(line: str) -> bool:
        return not any(map(str.isalnum, line))

    paragraph = itertools.dropwhile(is_frame, [line.strip(" │|") for line in page.splitlines()[1:]])
    text = itertools.takewhile(lambda line: not is_frame(line), paragraph)
    return " ".join(text) or "the command line could not be read"


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


def _flags_of(cls: Any) -> dict[str, Any]:
    """Each flag and its type; those of nested dataclasses and of subcommands are flat."""
    if not dataclasses.is_dataclass(cls):
        members = [getattr(member, "__origin__", member) for member in get_args(cls)]
        return {name: hint for member in members for name, hint in _flags_of(member).items()}
    flags: dict[str, Any] = {}
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        flags |= _flags_of(hint) if dataclasses.is_dataclass(hint) else {"--" + _name(field.name): hint}
    return flags
