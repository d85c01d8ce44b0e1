"""User errors in one line, and the exit codes of the commands.

Every module raises `UserError` (or a subclass) for a bad flag, file, shard or topology; `run_main` prints it on
standard error and exits with 2. Only bugs of this project end in a traceback.
"""

import os
import sys
import time
from collections.abc import Callable

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75
"""The run was stopped (signal or file) after saving; the same command continues it (EX_TEMPFAIL)."""
EXIT_LOST = 76
"""Another rank died, or a collective hung; the same command continues from the last checkpoint."""

QUIET_SECONDS = 5.0
"""How long the quiet ranks stay, so that the launcher does not kill the one that prints the error."""


class UserError(Exception):
    """An error in the user's input. The message is one line: the thing, its value, and the fix."""


class OneRankError(UserError):
    """An error that only this rank has seen: printed here, even where only one rank prints errors."""


class UnmadeStep(UserError):
    """A step could not be made, on any rank; the weights are those before it."""


def run_main(main: Callable[[], int | None], *, quiet: bool = False) -> None:
    """Run a command's `main` and exit the process with its code (None means 0).

    `UserError` becomes one line on standard error and exit code 2; `MINIMIND_TRACEBACK=1` in the environment shows the
    traceback instead. `quiet` is for ranks that print nothing: they wait `QUIET_SECONDS`. An interrupt exits with 130.
    """
    try:
        code = main() or 0
    except UserError as error:
        if os.environ.get("MINIMIND_TRACEBACK") == "1":
            raise
        if quiet and not isinstance(error, OneRankError):
            time.sleep(QUIET_SECONDS)
        else:
            print(f"error: {error}", file=sys.stderr, flush=True)
        code = EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 130
    except BrokenPipeError:
        # The reader of our output has closed it (`... | head`): there is nowhere to print.
        sys.stderr.close()
        code = 141
    sys.exit(code)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
