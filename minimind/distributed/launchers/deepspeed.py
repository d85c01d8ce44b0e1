"""The deepspeed launcher over several hosts, checked: `launch/deepspeed DEEPSPEED_FLAGS launch/pretrain.sh FLAGS`.

DeepSpeed builds a line for the shell of every host from what the user typed, without quoting it. Here whatever goes
into that line is checked or packed first, every host is tried, and the exit code is that of the remote side whatever
ends it. Knows nothing of training.
"""

import argparse
import base64
import binascii
import concurrent.futures
import contextlib
import json
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

from minimind.distributed.launchers.hosts import check_host, read_hostfile
from minimind.distributed.launchers.local import end_with_parent
from minimind.errors import UserError, run_main
from minimind.files import ROOT

FLAG = "--words="

SCRIPT = ROOT / "launch" / "pretrain.sh"
SSH_SECONDS = 10
# A connection whose other host is gone is given up after 30 s; otherwise pdsh would wait for ever.
SSH_OPTIONS = "-o BatchMode=yes -o ServerAliveInterval=10 -o ServerAliveCountMax=3"

_PLAIN = re.compile(r"[\w@%+=:,./-]+")
_NAME = re.compile(r"[A-Za-z_]\w*")
# DeepSpeed puts a value with other characters between double quotes, in which these have a meaning.
_UNSAFE = re.compile(r'["$`\\!\n\r]')


def main(args: Sequence[str] | None = None) -> int:
    """Run `deepspeed` with these arguments; its remote side's exit code.

    Raises:
        UserError: a value that would not pass the shells as it is, a host that does not answer, a bad hostfile.
    """
    words = list(sys.argv[1:] if args is None else args)
    given = runner.parse_args(words)
    hosts = select_hosts(given)
    exports = find_exports(os.environ, [Path.home(), Path.cwd()])
    check_plain(given)
    if os.environ.get("DRY_RUN") == "1":
        launcher_flags = words[: len(words) - len(given.user_args)]
        print(shlex.join(["deepspeed", *launcher_flags, pack_words(given.user_args)]))
        return 0
    try_hosts(list(hosts), given.ssh_port)
    command, environment = build_command(given, hosts, exports)
    return run_and_wait(command, environment)


def select_hosts(given: argparse.Namespace) -> dict[str, list[int]]:
    """Host -> slots that take part, after --include, --exclude, --num_nodes and --num_gpus.

    Raises:
        UserError: no hostfile, a bad one, or a filter that fits no host.
    """
    if not Path(given.hostfile).is_file():
        raise UserError(
            f"hostfile {given.hostfile}: not there; pass --hostfile FILE (see launch/hostfile.example), or use "
            "bash launch/pretrain.sh for one machine"
        )
    slots = read_hostfile(Path(given.hostfile))
    if (given.num_nodes >= 0 or given.num_gpus >= 0) and (given.include or given.exclude):
        raise UserError("--include/--exclude: not together with --num_nodes or --num_gpus")
    if given.num_nodes > len(slots):
        raise UserError(f"--num_nodes: {given.num_nodes}, but {given.hostfile} has {len(slots)} hosts")
    try:
        hosts = runner.parse_inclusion_exclusion(slots, given.include, given.exclude)
    except (ValueError, KeyError) as error:
        raise UserError(f"--include/--exclude: {error}; write node1@node2:0,1") from None
    hosts = runner.apply_num_nodes_and_gpus(hosts, given.num_nodes, given.num_gpus)
    if not hosts:
        raise UserError(f"{given.hostfile}: no host is left after --include/--exclude")
    return hosts


def check_plain(given: argparse.Namespace) -> None:
    """Refuse what would stand in a shell's line and is not plain.

    Raises:
        UserError: naming the flag or path.
    """
    if given.launcher.lower() != "pdsh":
        raise UserError(f"--launcher {given.launcher}: use launch/pretrain.sbatch or launch/pretrain_mpi.sh")
    if Path(given.user_script).resolve() != SCRIPT:
        raise UserError(f"{given.user_script}: only launch/pretrain.sh takes flags from another host's shell")
    if given.master_addr:
        check_host(given.master_addr, "--master_addr")
    for what, value in (
        ("the current folder", os.getcwd()),
        ("Python", sys.executable),
        ("the script", str(SCRIPT)),
        ("--venv_script", given.venv_script),
        ("--enable_each_rank_log", given.enable_each_rank_log),
    ):
        if value and not _PLAIN.fullmatch(str(value)):
            raise UserError(f"{what}: {value!r} would not pass another host's shell; use one without {odd(value)}")


def odd(value: str) -> str:
    """The characters of `value` that a shell may change."""
    return " ".join(sorted({repr(char) for char in str(value) if not _PLAIN.fullmatch(char)}))


def find_exports(environment: Mapping[str, str], folders: Sequence[Path]) -> dict[str, str]:
    """What DeepSpeed exports on every host: some variables of this one, and those of .deepspeed_env.

    Raises:
        UserError: a line of the file is no NAME=VALUE, or a value means something to a shell.
    """
    prefixes = (*runner.EXPORT_ENVS, *runner.get_accelerator().export_envs())
    found = {name: (value, name) for name, value in environment.items() if name.startswith(prefixes)}
    for folder in folders:
        path = folder / runner.DEEPSPEED_ENVIRONMENT_NAME
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            name, equals, value = line.strip().partition("=")
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            if not equals or not _NAME.fullmatch(name):
                raise UserError(f"{path} line {number}: {line.strip()!r} is not NAME=VALUE")
            found[name] = (value, f"{path} line {number}: {name}")
    for name, (value, where) in found.items():
        if not _NAME.fullmatch(name) or _UNSAFE.search(value):
            raise UserError(
                f'{where}: {value!r} means something to a shell; unset it, or do without " $ ` \\ ! and line ends'
            )
    return {name: value for name, (value, _) in found.items()}


def try_hosts(hosts: Sequence[str], port: int | None) -> None:
    """See that ssh reaches every host and that the repository is there.

    Raises:
        UserError: naming the hosts, and what ssh said of the first.
    """
    options = [*shlex.split(SSH_OPTIONS), "-o", f"ConnectTimeout={SSH_SECONDS}", *(["-p", str(port)] if port else [])]

    def attempt(host: str) -> str | None:
        command = ["ssh", *options, "--", host, f"test -f {shlex.quote(str(SCRIPT))}"]
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if result.returncode == 255:
            said = result.stderr.strip().splitlines() or ["no reason given"]
            return f"host {host} does not answer to ssh: {said[-1]}"
        return None if result.returncode == 0 else f"host {host} has no {SCRIPT}: share the folder, or copy it there"

    with concurrent.futures.ThreadPoolExecutor(min(64, len(hosts))) as pool:
        problems = [problem for problem in pool.map(attempt, hosts) if problem]
    if problems:
        more = f" (and {len(problems) - 1} more hosts)" if len(problems) > 1 else ""
        raise UserError(problems[0] + more)


def build_command(
    given: argparse.Namespace, hosts: dict[str, list[int]], exports: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """DeepSpeed's own command for pdsh, with the user's flags packed, and its environment."""
    given.user_args = [pack_words(given.user_args)]
    given.user_script = str(SCRIPT)
    given.master_addr = given.master_addr or next(iter(hosts))
    pdsh = PDSHRunner(given, runner.encode_world_info(hosts))
    if not pdsh.backend_exists():
        raise UserError("pdsh is not installed; install it, or use launch/pretrain_mpi.sh")
    environment = dict(os.environ)
    environment["PDSH_SSH_ARGS_APPEND"] = f"{environment.get('PDSH_SSH_ARGS_APPEND', '')} {SSH_OPTIONS}".strip()
    for name, value in exports.items():
        pdsh.add_export(name, value)
    if "PYTHONPATH" not in exports:
        pdsh.add_export("PYTHONPATH", str(SCRIPT.parent.parent))
    command, _, environment = pdsh.get_cmd(environment, hosts)
    return command, environment


def run_and_wait(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run pdsh and give its exit code, 128 + n where signal n ended it.

    pdsh ends with this process, however it ends, and on SIGTERM, SIGINT and SIGUSR1; the ranks notice, save and end.
    """
    process = subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=end_with_parent(),
    )

    def stop(number: int, _frame: object) -> None:
        print(
            f"{signal.Signals(number).name}: leaving the hosts; their ranks save and end", file=sys.stderr, flush=True
        )
        with contextlib.suppress(ProcessLookupError):
            process.terminate()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, stop)
    code = process.wait()
    return 128 - code if code < 0 else code


def pack_words(words: Sequence[str]) -> str:
    """The words as one flag of letters, digits, `-`, `_` and `=`."""
    return FLAG + base64.urlsafe_b64encode(json.dumps(list(words)).encode()).decode()


def unpack_words(args: Sequence[str]) -> list[str]:
    """`args` with every packed flag replaced by the words in it.

    Raises:
        UserError: a packed flag was damaged.
    """
    words: list[str] = []
    for arg in args:
        if not arg.startswith(FLAG):
            words.append(arg)
            continue
        try:
            words += json.loads(base64.urlsafe_b64decode(arg.removeprefix(FLAG)))
        except (ValueError, binascii.Error):
            raise UserError(f"{arg[:40]}: damaged on its way through a shell; start with launch/deepspeed") from None
    return words


if __name__ == "__main__":
    run_main(main)
