"""Start the ranks of one machine: `python -m minimind.distributed.launchers.local N SCRIPT ARGS`.

Signals are forwarded to every rank at once; when one rank fails, the others are ended; the exit code is that of the
first rank that failed (torchrun would turn 75 into 1); and the ranks end with this process, however it ends.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

PATIENCE_SECONDS = 10.0
"""After a rank has failed, the others have this long to print their own error and exit."""
GRACE_SECONDS = 30.0
"""Between SIGTERM and SIGKILL to the remaining ranks."""

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1


def main(args: list[str]) -> int:
    """Run `args[1:]` as `args[0]` ranks; the exit code of the first rank that failed, or 0."""
    world_size = int(args[0])
    port = os.environ.get("MASTER_PORT") or str(find_free_port())
    # Each in its own session, so that Ctrl-C reaches it once, through us.
    ranks = [
        subprocess.Popen(
            [sys.executable, *args[1:]],
            env=rank_environment(rank, world_size, port),
            start_new_session=True,
            preexec_fn=end_with_parent(),
        )
        for rank in range(world_size)
    ]
    for number in FORWARDED:
        signal.signal(number, lambda received, _frame: signal_ranks(ranks, received))
    return wait_for(ranks)


def find_free_port() -> int:
    """A TCP port that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def end_with_parent() -> Callable[[], object] | None:
    """A `preexec_fn`: the kernel sends the child SIGTERM when this process ends, however it ends. None: not Linux's,
    where a rank notices only by itself (`launchers.watch`)."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # found before the fork: until exec nothing may allocate
    return prctl and (lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM))


def rank_environment(rank: int, world_size: int, port: str) -> dict[str, str]:
    """The environment of one rank of this machine."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


def signal_ranks(ranks: list[subprocess.Popen], number: int) -> None:
    """Send a signal to every rank that still runs."""
    for process in ranks:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)


def wait_for(ranks: list[subprocess.Popen]) -> int:
    """Wait until all ranks have ended; the first failure ends the others."""
    code, failed_at, asked = 0, 0.0, False
    while any(process.poll() is None for process in ranks):
        time.sleep(0.1)
        failed = [process for process in ranks if process.poll() not in (None, 0)]
        if failed and not code:
            code, failed_at = failed[0].returncode, time.monotonic()
        waited = time.monotonic() - failed_at if code else 0.0
        if waited > PATIENCE_SECONDS and not asked:
            signal_ranks(ranks, signal.SIGTERM)
            asked = True
        if waited > PATIENCE_SECONDS + GRACE_SECONDS:
            signal_ranks(ranks, signal.SIGKILL)
    return exit_code(code or next((process.returncode for process in ranks if process.returncode), 0))


def exit_code(code: int) -> int:
    """A child's `returncode` as an exit code: 128 + n where signal n ended it, as in a shell."""
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
