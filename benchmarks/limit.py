"""Ends a command, and all that it has started, when it takes longer than it may:
python benchmarks/limit.py MINUTES COMMAND..."""

import sys

import psutil
from turns import end_family


def main(minutes: float, command: list[str]) -> int:
    """The exit code of the command; 124: it was ended."""
    process = psutil.Popen(command)
    try:
        code = process.wait(60 * minutes)
    except psutil.TimeoutExpired:
        end_family(process.pid, patience=60)
        return 124
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
