"""Run a command as on a Mac, as far as Linux can: python tests/support/bare_machine [--bash PATH] [--tools DIR] COMMAND

/proc is empty, PATH holds POSIX's tools alone, and Python has no core masks, starts processes by spawn and tells this
project that it is on macOS. Needs root, or user namespaces. What it cannot show: Metal, clang, macOS's own kernel.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOOLS = [
    "awk", "basename", "bash", "cat", "chmod", "cksum", "cmp", "cp", "cut", "date", "dirname", "echo", "env", "expr",
    "false", "find", "git", "grep", "head", "id", "kill", "ln", "ls", "mkdir", "mktemp", "mv", "printf", "pwd", "rm",
    "rmdir", "sed", "sh", "sleep", "sort", "tail", "tee", "test", "touch", "tr", "true", "uname", "uniq", "wc", "xargs",
]  # fmt: skip
"""POSIX's, bash, and git, by which a clone was made."""


def make_path(folder: Path, python: str, bash: str | None, tools: Path | None) -> None:
    """The programs that the command finds; `tools` are taken before this machine's."""
    folder.mkdir()
    for name in TOOLS:
        own = tools / name if tools and (tools / name).exists() else shutil.which(name)
        if own is not None:
            (folder / name).symlink_to(bash if name == "bash" and bash else own)
    # No link: a virtual environment would lead to it when this folder has gone.
    (folder / "python3").write_text(f'#!/bin/sh\nexec "{python}" "$@"\n')
    (folder / "python3").chmod(0o755)


def main() -> int:
    """The exit code of the command."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--bash", help="another bash, such as a 3.2 that was built here")
    flags.add_argument("--tools", type=Path, help="a folder of tools to take before this machine's, such as BSD's")
    flags.add_argument("command", nargs=argparse.REMAINDER)
    given = flags.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_path(folder / "bin", os.path.realpath(sys._base_executable), given.bash, given.tools)
        (folder / "proc").mkdir()
        hide = 'mount --rbind /proc "$1/proc" && mount -t tmpfs none /proc && PATH="$1/bin" && shift && exec "$@"'
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE / "startup"), os.environ.get("PYTHONPATH")])),
            "BARE_PROC": str(folder / "proc"),
            "GLOO_SOCKET_IFNAME": "lo",  # macOS's own is called lo0
            "TMPDIR": os.environ.get("TMPDIR", "/tmp"),
        }
        unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
        command = [*unshare, shutil.which("bash") or "bash", "-c", hide, "bare", name, *given.command]
        return subprocess.call(command, env=environment)


if __name__ == "__main__":
    sys.exit(main())
