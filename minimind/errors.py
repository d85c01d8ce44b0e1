"""What a person did wrong, said in one line.

Every module raises `UserError` (or a subclass) for a bad flag, file, shard or topology. The command-line entries turn
it into one line on standard error and exit code 2. A traceback is left for our own bugs. Knows nothing of torch,
ranks or files.
"""

import os
import sys
import time
from collections.abc import Callable

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75
"""A run was asked to stop (signal or file), has saved, and continues when it is started again (EX_TEMPFAIL)."""
EXIT_LOST = 76
"""A run ended because another of its ranks was gone, or a collective hung; it continues from its last checkpoint."""

QUIET_SECONDS = 5.0
"""How long a rank that does not speak leaves the one that does to say its line."""


class UserError(Exception):
    """A mistake in what the user gave. The message is one line: the thing, its value, and the fix."""


class OneRankError(UserError):
    """A mistake that only the rank it happened on knows of: it says so itself, even where another speaks for all."""


def run_main(main: Callable[[], int | None], *, quiet: bool = False) -> None:
    """Run a command's `main` and exit the process with its code (None means 0).

    `UserError` becomes one line on standard error and exit code 2. `quiet` leaves the line out, as only one of many
    ranks speaks, and waits a little: launchers kill the other ranks when the first one has ended. With
    `MINIMIND_TRACEBACK=1` in the environment the traceback is shown instead. An interrupt exits with 130.
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
        # The reader of our output went away (`... | head`): nothing to say, and nowhere to say it.
        sys.stderr.close()
        code = 141
    sys.exit(code)


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
