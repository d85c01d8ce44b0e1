"""Host names, checked before a launcher gives them to ssh.

    python -m minimind.distributed.launchers.hosts MPIRUN_FLAGS

A name that begins with a hyphen would be an option of ssh, and one with special characters could be a command.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from minimind.errors import UserError, run_main

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
# The flags of mpirun (Open MPI, MPICH) for a file of hosts, and for a list of hosts.
_FILES = {"hostfile", "machinefile", "default-hostfile", "f"}
_LISTS = {"host", "hosts", "H"}


def check_host(name: str, where: str) -> str:
    """`name`, if it is a valid host name or IPv4 address.

    Raises:
        UserError: it is not, with its place `where`.
    """
    if not _HOST.fullmatch(name):
        raise UserError(f"{where}: {name!r} is not a host name; use letters, digits, dots and hyphens")
    return name


def read_host_lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(place, words) of each line of a host file, without comments and empty lines.

    Raises:
        UserError: it cannot be read.
    """
    if not path.is_file():
        raise UserError(
            f"hostfile {path}: No such file; pass one (see launch/hostfile.example), or use bash launch/pretrain.sh "
            "for one machine"
        )
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
        UserError: a line that is not `HOST slots=N`, a host that is listed twice, or none at all.
    """
    slots: dict[str, int] = {}
    for place, words in read_host_lines(path):
        host = check_host(words[0], place)
        count = re.fullmatch(r"slots=([1-9]\d{0,3})", words[1]) if len(words) == 2 else None
        if count is None:
            raise UserError(f"{place}: {' '.join(words)!r} is not of the form 'node1 slots=8'")
        if host in slots:
            raise UserError(f"{place}: {host} is listed twice; give each host one line")
        slots[host] = int(count[1])
    if not slots:
        raise UserError(f"hostfile {path}: lists no host; write lines like 'node1 slots=8'")
    return slots


def check_mpirun_flags(args: Sequence[str]) -> None:
    """Check every host in the flags of mpirun and in the files they name.

    Raises:
        UserError: one is not a host name, or a file cannot be read.
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


if __name__ == "__main__":
    run_main(lambda: check_mpirun_flags(sys.argv[1:]))
