"""Host names of a run, checked before any launcher hands them to ssh.

    python -m minimind.distributed.launchers.hosts MPIRUN_FLAGS

A name that begins with a hyphen would be an option of ssh, and one with other characters could be a command. Knows
nothing of ranks.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from minimind.errors import UserError, run_main

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_LONGEST = 253

# What mpirun (Open MPI, MPICH) calls a file of hosts, and a list of hosts.
_FILES = {"hostfile", "machinefile", "default-hostfile", "f"}
_LISTS = {"host", "hosts", "H"}


def check_host(name: str, where: str) -> str:
    """`name`, where it can be a host's name or IPv4 address.

    Raises:
        UserError: it cannot; `where` says where it stands.
    """
    if not _HOST.fullmatch(name) or len(name) > _LONGEST:
        raise UserError(f"{where}: {name!r} is no host name; use letters, digits, dots and hyphens")
    return name


def read_host_lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(place, words) of each line of a host file that is not empty or a comment.

    Raises:
        UserError: it cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"hostfile {path}: {reason}; give a file with a host on each line") from None
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if words:
            yield f"{path} line {number}", words


def read_hostfile(path: Path) -> dict[str, int]:
    """Host -> slots of a DeepSpeed hostfile, in order.

    Raises:
        UserError: a line that is not `HOST slots=N`, a host that stands twice, or none at all.
    """
    slots: dict[str, int] = {}
    for place, words in read_host_lines(path):
        host = check_host(words[0], place)
        count = re.fullmatch(r"slots=([1-9]\d{0,3})", words[1]) if len(words) == 2 else None
        if count is None:
            raise UserError(f"{place}: {' '.join(words)!r} is not of the form 'node1 slots=8'")
        if host in slots:
            raise UserError(f"{place}: {host} stands twice; give each host one line")
        slots[host] = int(count[1])
    if not slots:
        raise UserError(f"hostfile {path}: no host in it; write lines like 'node1 slots=8'")
    return slots


def check_mpirun_flags(args: Sequence[str]) -> None:
    """Check every host that the flags of an mpirun name, in files too.

    Raises:
        UserError: one is no host name, or a file cannot be read.
    """
    for index, arg in enumerate(args):
        if not arg.startswith("-"):
            continue
        name, equals, value = arg.lstrip("-").partition("=")
        if not equals:
            value = args[index + 1] if index + 1 < len(args) else ""
        if name in _FILES:
            for place, words in read_host_lines(Path(value)):
                check_host(words[0].split(":")[0], place)
        elif name in _LISTS:
            for host in value.split(","):
                check_host(host.split(":")[0], arg)


def main() -> None:
    check_mpirun_flags(sys.argv[1:])


if __name__ == "__main__":
    run_main(main)
