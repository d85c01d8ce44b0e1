"""The deepspeed launcher over several hosts, checked: `launch/deepspeed DEEPSPEED_FLAGS launch/pretrain.sh FLAGS`.

DeepSpeed puts values unquoted into a shell's command line for every host. Here they are checked or packed first, every
host is tried, and the exit code is that of the remote side, whatever ends it.
"""

import argparse
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
from minimind.errors import UserError, first_line, run_main
from minimind.files import ROOT

FLAG = "--words="
SCRIPT = ROOT / "launch" / "pretrain.sh"
# A connection to a dead host is given up after 30 s; otherwise pdsh would wait for ever.
SSH_OPTIONS = "-o BatchMode=yes -o ServerAliveInterval=10 -o ServerAliveCountMax=3"

_PLAIN = re.compile(r"[\w@%+=:,./-]+")
_NAME = re.compile(r"[A-Za-z_]\w*")
# DeepSpeed puts the value of a variable between double quotes, in which these have a meaning.
_UNSAFE = re.compile(r'["$`\\!\n\r]')


def main(args: Sequence[str] | None = None) -> int:
    """Run `deepspeed` with these arguments; the exit code of its remote side.

    Raises:
        UserError: a value that a shell would change, a host that does not answer, a bad hostfile.
    """
    words = list(sys.argv[1:] if args is None else args)
    given = runner.parse_args(words)
    hosts = select_hosts(given)
    exports = find_exports(os.environ, [Path.home(), Path.cwd()])
    check_plain(given)
    launcher_flags = words[: len(words) - len(given.user_args)]
    given.user_args = [pack_words(given.user_args)]
    if os.environ.get("DRY_RUN") == "1":
        print(shlex.join(["deepspeed", *launcher_flags, *given.user_args]))
        return 0
    try_hosts(list(hosts), given.ssh_port)
    return run_and_wait(*build_command(given, hosts, exports))


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
    hosts = runner.apply_num_nodes_and_gpus(hosts, given.num_nodes, given.num_gpus)
    if not hosts:
        raise UserError(f"{given.hostfile}: no host is left after --include/--exclude")
    return hosts


def check_plain(given: argparse.Namespace) -> None:
    """Refuse what a shell would change.

    Raises:
        UserError: naming the flag or path.
    """
    if given.launcher.lower() != "pdsh":
        raise UserError(f"--launcher {given.launcher}: use launch/pretrain.sbatch or launch/pretrain_mpi.sh")
    if Path(given.user_script).resolve() != SCRIPT:
        raise UserError(f"{given.user_script}: only launch/pretrain.sh can read flags that passed a shell")
    if given.master_addr:
        check_host(given.master_addr, "--master_addr")
    for what, value in {
        "the current folder": os.getcwd(),
        "Python": sys.executable,
        "the script": str(SCRIPT),
        "--venv_script": given.venv_script or "",
        "--enable_each_rank_log": given.enable_each_rank_log or "",
    }.items():
        if odd := sorted({char for char in str(value) if not _PLAIN.fullmatch(char)}):
            raise UserError(f"{what}: a shell would change {value!r}; use one without {' '.join(map(repr, odd))}")


def find_exports(environment: Mapping[str, str], folders: Sequence[Path]) -> dict[str, str]:
    """The variables that DeepSpeed exports on every host: some of this one, and those of .deepspeed_env.

    Raises:
        UserError: a line of the file is not NAME=VALUE, or a shell would change a value.
    """
    prefixes = (*runner.EXPORT_ENVS, *runner.get_accelerator().export_envs())
    found = {name: (value, name) for name, value in environment.items() if name.startswith(prefixes)}
    for path in (folder / runner.DEEPSPEED_ENVIRONMENT_NAME for folder in folders):
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for number, line in enumerate(map(str.strip, lines), 1):
            name, equals, value = line.partition("=")
            if line and not line.startswith("#"):
                if not equals or not _NAME.fullmatch(name):
                    raise UserError(f"{path} line {number}: {line!r} is not NAME=VALUE")
                found[name] = (value, f"{path} line {number}: {name}")
    for name, (value, where) in found.items():
        if not _NAME.fullmatch(name) or _UNSAFE.search(value):
            raise UserError(f'{where}: a shell would change {value!r}; unset it, or avoid " $ ` \\ ! and line ends')
    return {name: value for name, (value, _) in found.items()}


def try_hosts(hosts: Sequence[str], port: int | None) -> None:
    """Check that ssh reaches every host and that the repository is there.

    Raises:
        UserError: naming the first host that fails, and why.
    """
    options = [*shlex.split(SSH_OPTIONS), "-o", "ConnectTimeout=10", *(["-p", str(port)] if port else [])]

    def find_problem(host: str) -> str | None:
        command = ["ssh", *options, "--", host, f"test -f {shlex.quote(str(SCRIPT))}"]
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if result.returncode == 255:  # ssh's own failure
            said = result.stderr.strip().splitlines() or ["no reason given"]
            return f"host {host} does not answer to ssh: {said[-1]}"
        return None if result.returncode == 0 else f"host {host} has no {SCRIPT}: share the folder, or copy it there"

    with concurrent.futures.ThreadPoolExecutor(min(64, len(hosts))) as pool:
        problems = [problem for problem in pool.map(find_problem, hosts) if problem]
    if problems:
        raise UserError(problems[0] + (f" (and {len(problems) - 1} more hosts)" if len(problems) > 1 else ""))


def build_command(
    given: argparse.Namespace, hosts: dict[str, list[int]], exports: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """DeepSpeed's own command for pdsh, and its environment."""
    given.user_script = str(SCRIPT)
    given.master_addr = given.master_addr or next(iter(hosts))
    pdsh = PDSHRunner(given, runner.encode_world_info(hosts))
    if not pdsh.backend_exists():
        raise UserError("pdsh is not installed; install it, or use launch/pretrain_mpi.sh")
    for name, value in {"PYTHONPATH": str(ROOT), **exports}.items():
        pdsh.add_export(name, value)
    ssh_options = f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} {SSH_OPTIONS}".strip()
    command, _, environment = pdsh.get_cmd({**os.environ, "PDSH_SSH_ARGS_APPEND": ssh_options}, hosts)
    return command, environment


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

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, stop)
    code = process.wait()
    return 128 - code if code < 0 else code


def pack_words(words: Sequence[str]) -> str:
    """The words as one flag that no shell changes."""
    return FLAG + json.dumps(list(words)).encode().hex()


def unpack_words(args: Sequence[str]) -> list[str]:
    """`args` with every packed flag replaced by its words.

    Raises:
        UserError: a packed flag is damaged.
    """
    words: list[str] = []
    for arg in args:
        try:
            words += json.loads(bytes.fromhex(arg.removeprefix(FLAG))) if arg.startswith(FLAG) else [arg]
        except ValueError:
            raise UserError(f"{arg[:40]}: damaged; start with launch/deepspeed") from None
    return words


if __name__ == "__main__":
    run_main(main)
