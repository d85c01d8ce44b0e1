"""Ends a command, and all that it has started, when it takes longer than it may:
python benchmarks/limit.py MINUTES COMMAND..."""

import contextlib
import os
import signal
import subprocess
import sys

GRACE_SECONDS = 60.0


def main(minutes: float, command: list[str]) -> int:
    """The exit code of the command; 124: it was ended."""
    process = subprocess.Popen(command, start_new_session=True)
    code = 124
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(60 * minutes)
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(GRACE_SECONDS)
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
