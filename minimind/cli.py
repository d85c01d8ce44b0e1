"""Command-line flags from dataclasses, through tyro, with errors of one line.

tyro draws a box of several lines for a mistake; here the same words become one `UserError`, which the entries print and
turn into exit code 2. Knows nothing of what the flags mean.
"""

import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_type_hints

import tyro

from minimind.errors import UserError
from minimind.schema import nearest

T = TypeVar("T")

# tyro draws its boxes with these; on an output that is not UTF-8, with the plain ones.
_RULE = re.compile(r"[\s╭╮╰╯│─+|-]*(─{2}|-{3})[\s╭╮╰╯│─+|-]*")
_EDGE = re.compile(r"^\s*[│|]|[│|]\s*$")
# What tyro 1.0 says, after `Error parsing --flag: `.
_NO_TYPE = re.compile(r"Error parsing (\S+): no type matching (?:\{None\}\|)?(.*) could be .* from \[(.*)\]")
_NO_NUMBER = re.compile(r"Error parsing (\S+): (?:invalid literal for|could not convert string to) (\w+).*: (.*)")


def parse_flags(cls: type[T], args: Sequence[str], *, default: T | None = None, prog: str | None = None) -> T:
    """Parse `args` into the dataclass `cls`; `--help` prints and leaves with code 0.

    Args:
        prog: how the command is called, for the help and the errors.

    Raises:
        UserError: an unknown flag, a missing or a wrong value, naming the flag and the nearest one.
    """
    given: Any = tyro.MISSING if default is None else default
    return _call(cls, args, lambda: tyro.cli(cls, args=args, prog=prog, default=given), prog)


def without_local_rank(args: Sequence[str]) -> list[str]:
    """`args` without the --local_rank=N that the deepspeed launcher adds; the environment has it too."""
    return [arg for arg in args if not arg.startswith(("--local_rank=", "--local-rank="))]


def parse_known_flags(cls: type[T], args: Sequence[str], *, default: T, prog: str | None = None) -> T:
    """As `parse_flags`, passing over flags that `cls` does not have (`--help` too)."""
    rest = [arg for arg in args if arg not in ("-h", "--help")]
    return _call(cls, rest, lambda: tyro.cli(cls, args=rest, default=default, return_unknown_args=True)[0], prog)


def _call(cls: type, args: Sequence[str], parse: Callable[[], T], prog: str | None) -> T:
    if any(arg in ("-h", "--help") for arg in args):
        return parse()
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors):
            return parse()
    except SystemExit as error:
        if not error.code:
            raise
    program = prog or sys.argv[0].rsplit("/", 1)[-1]
    raise UserError(f"{_reword(*_unfold(errors.getvalue()), _flag_names(cls))} (flags: {program} --help)")


def _flag_names(cls: Any) -> list[str]:
    names = []
    for name, hint in get_type_hints(cls).items():
        names += _flag_names(hint) if dataclasses.is_dataclass(hint) else ["--" + name.replace("_", "-")]
    return names


def _unfold(text: str) -> tuple[str, list[str]]:
    """The title of tyro's box, and its lines: the message, a rule as an empty line, what may help."""
    title, *lines = text.splitlines() or [""]
    unboxed = ["" if _RULE.fullmatch(line) else _EDGE.sub("", line).strip() for line in lines]
    if unboxed and not unboxed[0]:  # the plain box rules off its title
        del unboxed[0]
    return title.strip(" ╭╮─+-"), unboxed


def _reword(title: str, lines: list[str], known: list[str]) -> str:
    """One line for a person, from the words of tyro 1.0; what is not recognised keeps tyro's own."""
    if title.startswith("Required options"):
        end = lines.index("Unrecognized options:") if "Unrecognized options:" in lines else len(lines)
        unknown_flags = "".join(f"unknown flag {name}; " for name in _flags_in(lines[end:]))
        return f"{unknown_flags}missing {', '.join(_flags_in(lines[:end]))}"
    end = next((i for i, line in enumerate(lines) if not line or line.startswith("Got errors")), len(lines))
    message = " ".join(lines[:end])
    if unknown := re.match(r"Unrecognized options: (\S+?)(,|$)", message):
        if not unknown[1].startswith("-"):
            return f"unexpected argument '{unknown[1]}'"
        name = unknown[1].split("=")[0]
        return f"unknown flag {name}{nearest(name, known)}"
    if wrong := _NO_TYPE.match(message):
        values, wanted = wrong[3].replace("', '", "' '"), wrong[2].strip("{}")
        return f"{wrong[1]}: {values} is not {wanted}"
    if wrong := _NO_NUMBER.match(message):
        return f"{wrong[1]}: {wrong[3]} is not {wrong[2].upper()}"
    if missing := re.match(r"Missing value for argument '(.*)'\.", message):
        return f"{missing[1]}: a value is missing"
    if choice := re.match(r"invalid choice (.*) for argument '(.*)'\. Expected one of \((.*)\)", message):
        choices = sorted(name for name in re.findall(r"'([^']*)'", choice[3]) if name != "None")
        return f"{choice[2]}: {choice[1]} is not one of {', '.join(choices)}"
    return message or "the command line could not be read"


def _flags_in(lines: list[str]) -> list[str]:
    return [line.split()[0].rstrip(",") for line in lines if line.startswith("--")]
