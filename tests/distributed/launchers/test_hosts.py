"""Host names and flags on their way to other hosts' shells: checked, or packed so that no shell changes them."""

import subprocess

import pytest

from minimind.distributed.launchers.deepspeed import find_exports, pack_words, unpack_words
from minimind.distributed.launchers.hosts import check_host, check_mpirun_flags, read_hostfile
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
    with pytest.raises(UserError, match=r"hostfile .*: No such file"):
        read_hostfile(tmp_path / "none")


def test_hosts_in_the_flags_of_mpirun_are_checked(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("n1 slots=2\nn2:4\n")
    check_mpirun_flags(["-np", "2", "-hostfile", str(path), "--host", "n1:2,n2"])
    path.write_text("-oX=1:2\n")
    for flags in (["-f", str(path)], [f"--hostfile={path}"], ["-H", "n1,-oX"], ["-hosts", "a;b"]):
        with pytest.raises(UserError, match="is not a host name"):
            check_mpirun_flags(flags)


WORDS = ["--run-dir", "a b; $(touch x) `y` 'q' \"r\" \\ ! * 中文\n", ""]


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_packed_flags_pass_a_shell_unchanged(shell):
    packed = pack_words(WORDS)
    said = subprocess.run([shell, "-c", f"printf %s {packed}"], capture_output=True, text=True, check=True).stdout
    assert unpack_words(["--local_rank=0", said]) == ["--local_rank=0", *WORDS]
    with pytest.raises(UserError, match="damaged"):
        unpack_words([packed[:-5]])


def test_exported_values_are_refused_where_a_shell_would_read_them(tmp_path):
    file = tmp_path / ".deepspeed_env"
    file.write_text("# comment\n\nGLOO_SOCKET_IFNAME=eth0\nA=b c\n")
    found = find_exports({"PYTHONPATH": "/a b", "HOME": "$(x)"}, [tmp_path])
    assert found == {"PYTHONPATH": "/a b", "GLOO_SOCKET_IFNAME": "eth0", "A": "b c"}
    with pytest.raises(UserError, match=r"PYTHONPATH: a shell would change"):
        find_exports({"PYTHONPATH": "$(x)"}, [])
    for line, words in (("A=`b`", "line 1: A: "), ("nonsense", "is not NAME=VALUE"), ("A;b=c", "is not NAME=VALUE")):
        file.write_text(line + "\n")
        with pytest.raises(UserError, match=words):
            find_exports({}, [tmp_path])
