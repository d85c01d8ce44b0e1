"""Command-line flags from dataclasses, through tyro, with errors of one line.

tyro draws a box of several lines for a mistake; here the same words become one `UserError`, which the entries print and
turn into exit code 2. Knows nothing of what the flags mean.
"""

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from minimind.errors import UserError

T = TypeVar("T")

_BOX = re.compile(r"[╭╮╰╯│─]+")


def parse_flags(cls: type[T], args: Sequence[str], *, default: T | None = None, prog: str | None = None) -> T:
    """Parse `args` into the dataclass `cls`; `--help` prints and leaves with code 0.

    Raises:
        UserError: an unknown flag, a missing or a wrong value, naming the flag and the nearest one.
    """
    given: Any = tyro.MISSING if default is None else default
    return _call(args, lambda: tyro.cli(cls, args=args, prog=prog, default=given))


def parse_known_flags(cls: type[T], args: Sequence[str], *, default: T) -> T:
    """As `parse_flags`, passing over flags that `cls` does not have (`--help` too)."""
    rest = [arg for arg in args if arg not in ("-h", "--help")]
    return _call(rest, lambda: tyro.cli(cls, args=rest, default=default, return_unknown_args=True)[0])


def _call(args, parse):
    if any(arg in ("-h", "--help") for arg in args):
        return parse()
    # tyro writes its errors to standard error; rich measures the terminal, so the text is unfolded from its box.
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors):
            return parse()
    except SystemExit as error:
        if not error.code:
            raise
    raise UserError(_unfold(errors.getvalue()) + f" (flags: {sys.argv[0].rsplit('/', 1)[-1]} --help)")


def _unfold(text: str) -> str:
    lines = [" ".join(_BOX.sub(" ", line).split()) for line in text.splitlines()]
    lines = [line for line in lines[1:] if line]  # the first line is the title of the box
    body: list[str] = []
    for line in lines:
        if line.startswith(("For full helptext", "Argument helptext", "Got errors")):
            break
        body.append(line)
    return " ".join(body) or "the command line could not be read"
