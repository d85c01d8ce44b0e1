"""Host names and flags on their way to other hosts' shells: checked, or quoted so that no shell changes them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.launcher import runner
from repository import ROOT

from minimind.distributed.launchers.deepspeed import (
    build_command,
    check_host,
    find_exports,
    main,
    read_hostfile,
    select_hosts,
)
from minimind.errors import UserError


@pytest.mark.parametrize("name", ["node1", "10.0.0.1", "gpu-07.cluster.example", "a_b"])
def test_names_of_hosts_pass(name):
    assert check_host(name, "here") == name


@pytest.mark.parametrize("name", ["-oProxyCommand=x", "a;b", "a b", "$(x)", "", "a`b`", "a\n", "node1-", "a" * 300])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(UserError, match=r"here: .* is not a host name"):
        check_host(name, "here")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("n1 slots=2\n-x slots=1\n", "line 2: '-x' is not a host name"),
        ("n1\n", "line 1: 'n1' is not of the form"),
        ("n1 slots=0\n", "is not of the form"),
        ("n1 slots=1; reboot\n", "is not of the form"),
        ("n1 slots=1\nn1 slots=1\n", "line 2: n1 is listed twice"),
        ("# nothing\n\n", "lists no host"),
    ],
)
def test_a_bad_hostfile_is_one_line(tmp_path, text, words):
    path = tmp_path / "hostfile"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_hostfile(path)
    assert words in str(error.value)


def test_a_hostfile_keeps_its_order(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("b slots=8  # first\n\na slots=4\n")
    assert list(read_hostfile(path).items()) == [("b", 8), ("a", 4)]
    with pytest.raises(UserError, match=r"hostfile .*: No such file or directory; pass one"):
        read_hostfile(tmp_path / "none")


WORDS = ["--run-dir", "a b; $(touch x) `y` 'q' \"r\" \\ ! * 中文\n", "100%", ""]


def write_hostfile(folder: Path) -> Path:
    path = folder / "hostfile"
    path.write_text("n1 slots=2\nn2 slots=2\n")
    return path


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_flags_and_variables_pass_pdsh_and_a_shell_unchanged(tmp_path, monkeypatch, capsys, shell):
    """A pdsh that does for one host what the real one does: the number instead of %n, and the line to a shell."""
    (tmp_path / "pdsh").write_text(
        f"#!{sys.executable}\nimport subprocess, sys\n"
        "line = ' '.join(sys.argv[sys.argv.index('-w') + 2:]).replace('%%', '\\0').replace('%n', '7')\n"
        "program = sys.executable + ' -u -m deepspeed.launcher.launch'\n"
        "line = line.replace('\\0', '%').replace(program, \"printf '%s|'\")\n"
        f"line += '; printf %s \"$PYTHON_X\"'\nsubprocess.run([{shell!r}, '-c', line])\n"
    )
    (tmp_path / "pdsh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    given = runner.parse_args(["--hostfile", str(write_hostfile(tmp_path)), "launch/pretrain.sh", *WORDS])
    command, environment = build_command(given, select_hosts(given), {"PYTHON_X": "$(x) 5%n"})
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    found = said.split("|")
    assert "--node_rank=7" in found and "--master_addr=n1" in found
    assert found[-len(WORDS) - 2 :] == [str(ROOT / "launch/pretrain.sh"), *WORDS, "$(x) 5%n"]


def test_what_cannot_be_quoted_is_refused(tmp_path, monkeypatch):
    hostfile = str(write_hostfile(tmp_path))
    monkeypatch.setenv("DRY_RUN", "1")
    for flags, words in (
        (["--master_addr=-oX"], "--master_addr: '-oX' is not a host name"),
        (["--launcher", "slurm"], r"--launcher slurm: use launch/pretrain\.sbatch"),
        (["--venv_script", "a b"], "'a b': a shell would change this path"),
        (["--include", "n9"], "--include/--exclude: Hostname 'n9' not found"),
    ):
        with pytest.raises(UserError, match=words):
            main(["--hostfile", hostfile, *flags, "launch/pretrain.sh"])


def test_exported_variables_come_from_here_and_from_a_file(tmp_path):
    file = tmp_path / ".deepspeed_env"
    file.write_text("# comment\n\nGLOO_SOCKET_IFNAME=eth0\nA=b c\n")
    found = find_exports({"PYTHONPATH": "/a b", "HOME": "$(x)", "PYTHON;x": "no name"}, [tmp_path])
    assert found == {"PYTHONPATH": "/a b", "GLOO_SOCKET_IFNAME": "eth0", "A": "b c"}
    for line in ("nonsense", "A;b=c", "=b"):
        file.write_text(line + "\n")
        with pytest.raises(UserError, match=r"line 1: .* is not NAME=VALUE"):
            find_exports({}, [tmp_path])
