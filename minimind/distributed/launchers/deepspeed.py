"""The deepspeed launcher over several hosts, checked: `launch/deepspeed DEEPSPEED_FLAGS launch/pretrain.sh FLAGS`.

DeepSpeed puts values unquoted into a shell's command line for every host. Here they are quoted, names of hosts are
checked, every host is tried first, and the exit code is that of the remote side, whatever ends it.
"""

import argparse
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from deepspeed.launcher import runner
from deepspeed.launcher.multinode_runner import PDSHRunner

from minimind.distributed.launchers.local import FORWARDED, end_with_parent, exit_code
from minimind.errors import UserError, first_line, run_main
from minimind.files import ROOT
from minimind.host import require_linux

# A connection to a dead host is given up after 30 s; otherwise pdsh would wait for ever.
SSH_OPTIONS = "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=3"
# A name that begins with a hyphen would be an option of ssh, and one with special characters could be a command.
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def main(args: Sequence[str] | None = None) -> int:
    """Run `deepspeed` with these arguments; the exit code of its remote side.

    Raises:
        UserError: a host that does not answer, a bad hostfile, a path that a shell would change, another system.
    """
    require_linux("launch/deepspeed", "on one machine: bash launch/pretrain.sh")
    given = runner.parse_args(sys.argv[1:] if args is None else list(args))
    hosts = select_hosts(given)
    command, environment = build_command(given, hosts, find_exports(os.environ, [Path.home(), Path.cwd()]))
    if os.environ.get("DRY_RUN") == "1":
        print(shlex.join(command))
        return 0
    try_hosts(command, environment, given.user_script)
    return run_and_wait(command, environment)


def select_hosts(given: argparse.Namespace) -> dict[str, list[int]]:
    """Host -> slots that take part, after --include, --exclude, --num_nodes and --num_gpus.

    Raises:
        UserError: no hostfile, a bad one, or a filter that fits no host.
    """
    slots = read_hostfile(Path(given.hostfile))
    if (given.num_nodes >= 0 or given.num_gpus >= 0) and (given.include or given.exclude):
        raise UserError("--include/--exclude: not together with --num_nodes or --num_gpus")
    if given.num_nodes > len(slots):
        raise UserError(f"--num_nodes: {given.num_nodes}, but {given.hostfile} has {len(slots)} hosts")
    try:
        hosts = runner.parse_inclusion_exclusion(slots, given.include, given.exclude)
    except (ValueError, KeyError) as error:
        raise UserError(f"--include/--exclude: {first_line(error)}; write node1@node2:0,1") from None
    if not hosts:
        raise UserError(f"{given.hostfile}: no host is left after --include/--exclude")
    return runner.apply_num_nodes_and_gpus(hosts, given.num_nodes, given.num_gpus)


def read_hostfile(path: Path) -> dict[str, int]:
    """Host -> slots of a DeepSpeed hostfile, in order.

    Raises:
        UserError: it cannot be read; a line that is not `HOST slots=N`, a host that is listed twice, or none at all.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(
            f"hostfile {path}: {reason}; pass one with lines like 'node1 slots=8', or use bash launch/pretrain.sh for "
            "one machine"
        ) from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words, place = line.partition("#")[0].split(), f"{path} line {number}"
        if not words:
            continue
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


def check_host(name: str, where: str) -> str:
    """`name`, if it is a valid host name or IPv4 address.

    Raises:
        UserError: it is not, with its place `where`.
    """
    if not _HOST.fullmatch(name):
        raise UserError(f"{where}: {name!r} is not a host name; use letters, digits, dots and hyphens")
    return name


def find_exports(environment: Mapping[str, str], folders: Sequence[Path]) -> dict[str, str]:
    """The variables that DeepSpeed exports on every host: some of this one, and those of .deepspeed_env.

    Raises:
        UserError: a line of the file is not NAME=VALUE.
    """
    prefixes = (*runner.EXPORT_ENVS, *runner.get_accelerator().export_envs())
    found = {name: value for name, value in environment.items() if name.startswith(prefixes)}
    for path in (folder / runner.DEEPSPEED_ENVIRONMENT_NAME for folder in folders):
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for number, line in enumerate(map(str.strip, lines), 1):
            name, equals, value = line.partition("=")
            if line and not line.startswith("#"):
                if not equals or not _VARIABLE.fullmatch(name):
                    raise UserError(f"{path} line {number}: {line!r} is not NAME=VALUE")
                found[name] = value
    return {name: value for name, value in found.items() if _VARIABLE.fullmatch(name)}


def build_command(
    given: argparse.Namespace, hosts: dict[str, list[int]], exports: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """DeepSpeed's own command for pdsh with every value quoted, and its environment.

    Raises:
        UserError: another launcher, no pdsh, or a path that DeepSpeed hands to the shell as it is and that has a blank.
    """
    if given.launcher.lower() != "pdsh":
        raise UserError(f"--launcher {given.launcher}: use launch/pretrain.sbatch or launch/pretrain_mpi.sh")
    for path in (os.getcwd(), sys.executable, given.venv_script or ".", given.enable_each_rank_log):
        if quote(path) != path:
            raise UserError(f"{path!r}: a shell would change this path; use one of letters, digits and ./_-")
    given.master_addr = check_host(given.master_addr or next(iter(hosts)), "--master_addr")
    given.user_script = str(Path(given.user_script).resolve())
    pdsh = PDSHRunner(given, runner.encode_world_info(hosts))
    if not pdsh.backend_exists():
        raise UserError("pdsh is not installed; install it, or use launch/pretrain_mpi.sh")
    pdsh.user_script = quote(given.user_script)
    pdsh.user_arguments = [quote(word) for word in given.user_args]
    pdsh.exports = {name: quote(value) for name, value in {"PYTHONPATH": str(ROOT), **exports}.items()}
    ssh_options = f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} {SSH_OPTIONS}".strip()
    command, _, environment = pdsh.get_cmd({**os.environ, "PDSH_SSH_ARGS_APPEND": ssh_options}, hosts)
    return command, environment


def quote(word: str) -> str:
    """`word` as pdsh has to get it: for a shell, and with % doubled, as pdsh puts the host's number for %n."""
    return shlex.quote(word).replace("%", "%%")


def try_hosts(command: Sequence[str], environment: Mapping[str, str], script: str) -> None:
    """Check that ssh reaches every host and that the script is there, by the run's own pdsh.

    Raises:
        UserError: naming the first host that fails, and why.
    """
    test = f"test -f {quote(script)} || {{ echo has no {quote(script)} >&2; exit 1; }}"
    pdsh = [*command[: command.index("-w") + 2], test]
    result = subprocess.run(pdsh, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        said = [line for line in result.stderr.splitlines() if not line.startswith("pdsh@")] or ["no reason given"]
        raise UserError(f"not every host answers to ssh and has the repository: {said[-1]}")


def run_and_wait(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run pdsh; its exit code, 128 + n where signal n ended it.

    pdsh ends with this process, however it ends, and on SIGTERM, SIGINT and SIGUSR1; the ranks then save and exit.
    """
    process = subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=end_with_parent(),
    )

    def stop(number: int, _frame: object) -> None:
        name = signal.Signals(number).name
        print(f"{name}: disconnecting from the hosts; their ranks save and exit", file=sys.stderr, flush=True)
        with contextlib.suppress(ProcessLookupError):
            process.terminate()

    for number in FORWARDED:
        signal.signal(number, stop)
    return exit_code(process.wait())


if __name__ == "__main__":
    run_main(main)
