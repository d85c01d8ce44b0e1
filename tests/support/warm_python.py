"""An interpreter that has imported everything: commands run in forks of it, so forty of them import torch once.

    with warm_python(folder / "python") as program:
        subprocess.run([program, "-m", "minimind.generate", "--checkpoint", ...])

`program` takes `-m MODULE`, `-c CODE` or SCRIPT, and keeps arguments, working folder, environment, standard streams and
exit code as the interpreter does. What the modules read from the environment at import is the server's.
"""

import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from repository import ROOT

# Rooms, not commands: a module that is to run as `__main__` should not be there already.
PRELOAD = (
    "minimind.training.setup",
    "minimind.checkpoints.formats.export",
    "minimind.checkpoints.formats.averaging",
    "minimind.inference.chat",
    "minimind.inference.evaluation",
    "minimind.reports.plan.table",
    "minimind.reports.doctor.software",
    "minimind.reports.run.page",
)
CLIENT = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [b"."], [0, 1, 2])
    server.sendall(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode() + b"\\n")
    answer = server.makefile().read()
sys.exit(int(answer) if answer else 1)
"""


@contextlib.contextmanager
def warm_python(program: Path) -> Iterator[Path]:
    """Write the executable `program`, and answer it as long as the context lasts."""
    with tempfile.TemporaryDirectory() as folder:  # short: an address of a socket has 107 characters at most
        address = f"{folder}/socket"
        program.write_text(CLIENT.format(python=sys.executable, address=address))
        program.chmod(0o755)
        command = [sys.executable, __file__, address]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None and server.stdout.readline() == "ready\n", "the server did not start"
                yield program
            finally:
                server.kill()


def serve(address: str) -> None:
    """Import, then answer one connection after the other; returns only in the forks that run a command."""
    for name in PRELOAD:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                return answer(connection)
            connection.close()


def answer(connection: socket.socket) -> None:
    """In a fork: run the command in another, and tell its exit code; returns only in the one that runs it."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    arguments, folder, environment = json.loads(connection.makefile().readline())
    command = os.fork()
    if command:
        _, status = os.waitpid(command, 0)
        connection.sendall(str(os.waitstatus_to_exitcode(status) % 256).encode())
        os._exit(0)
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    run(arguments, folder)


def run(arguments: list[str], folder: str) -> Any:
    """What the interpreter does with its arguments."""
    first, *rest = arguments
    if first == "-m":
        sys.argv, sys.path[0] = rest, folder
        return runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    if first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], folder
        return exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    sys.argv, sys.path[0] = arguments, str(Path(first).resolve().parent)
    return runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
