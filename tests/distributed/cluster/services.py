"""What a cluster has, started on this machine: SLURM with two nodes, hosts with their own network and sshd, mpirun.

Everything is started in the foreground, keeps its state in a folder of the test, and is ended by its own process id.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from repository import ROOT

from minimind.distributed.launchers.local import find_free_port

BIN = Path(sys.executable).parent
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def need(*programs: str) -> None:
    """Skip unless this is root on a Linux machine with these programs and namespaces."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    missing = [name for name in programs if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    result = subprocess.run(["unshare", "--mount", "--uts", "true"], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        pytest.skip(f"no namespaces here: {result.stderr.strip()}")


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment without what launchers set, and with every program findable."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    return {**kept, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", **more}


def wait_until(condition: Callable[[], object], seconds: float, what: Callable[[], object]) -> None:
    """Wait for `condition`; `what` says what is known when it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what()}"
        time.sleep(0.1)


def wait_for_steps(run_dir: Path, count: int, output: Path) -> None:
    """Wait until a run has logged `count` steps; else say what its command printed into `output`."""
    metrics = run_dir / "metrics.jsonl"

    def said() -> str:
        return output.read_text() if output.exists() else f"{output} is not there: it was never started"

    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= count, 120, said)


class Services:
    """Processes that run until `close`, each with its output in a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._running: list[subprocess.Popen] = []

    def start(self, command: Sequence[object], **environment: str) -> subprocess.Popen:
        words = [str(word) for word in command]
        number = len(self._running)
        with open(self.folder / f"service-{number}.log", "w") as log:
            process = subprocess.Popen(
                words,
                env=clean_environment(**environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._running.append(process)
        return process

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-1500:] for path in sorted(self.folder.glob("service-*.log")))

    def close(self) -> None:
        for process in reversed(self._running):
            process.terminate()
        for process in reversed(self._running):
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(15)


def with_hosts_file(hosts: Path, command: Sequence[object]) -> list[object]:
    """`command` in a mount namespace whose /etc/hosts is `hosts`; the process id is the command's own."""
    script = 'mount --bind "$1" /etc/hosts && shift && exec "$@"'
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", hosts, *command]


# SLURM ---------------------------------------------------------------------------------------------------------------

_SLURM_CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
AuthInfo=socket={folder}/munge-socket/socket,cred_expire=5
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
MailProg=/bin/true
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """A cluster of the nodes n1 and n2, one processor each."""

    def __init__(self, folder: Path) -> None:
        need("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "setpriv", "unshare")
        self.folder = folder
        self._services = Services(folder)
        host = socket.gethostname().split(".")[0]
        first = find_free_port() % 10000 + 20000
        text = _SLURM_CONF.format(folder=folder, host=host, controller=first + 2, first=first, last=first + 1)
        (folder / "slurm.conf").write_text(text)
        (folder / "state").mkdir()
        hosts = folder / "hosts"
        hosts.write_text(f"127.0.0.1 localhost {socket.gethostname()} n1 n2\n")
        self.environment = clean_environment(SLURM_CONF=str(folder / "slurm.conf"))
        try:
            self._start_daemons(hosts)
        except BaseException:
            self._services.close()
            raise

    def _start_daemons(self, hosts: Path) -> None:
        folder = self.folder
        self._start_munge()
        conf = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._services.start(with_hosts_file(hosts, ["slurmctld", "-D"]), **conf)
        for node in ("n1", "n2"):
            (folder / f"spool-{node}").mkdir()
            self._services.start(with_hosts_file(hosts, ["slurmd", "-D", "-N", node]), **conf)

    def _start_munge(self) -> None:
        """As its own user, with a key of its own, and a socket that everybody reaches."""
        private, public = self.folder / "munge", self.folder / "munge-socket"
        private.mkdir(mode=0o700)
        public.mkdir(mode=0o755)
        (private / "key").write_bytes(os.urandom(128))
        (private / "key").chmod(0o400)
        for path in (private, private / "key", public):
            shutil.chown(path, "munge", "munge")
        files = {"socket": public / "socket", "key-file": private / "key", "pid-file": private / "pid"}
        files |= {"log-file": private / "log", "seed-file": private / "seed"}
        flags = [f"--{name}={path}" for name, path in files.items()]
        user = ["setpriv", "--reuid=munge", "--regid=munge", "--init-groups"]
        self._services.start([*user, "munged", "--foreground", *flags])
        wait_until((public / "socket").exists, 20, self._services.logs)

    def run(self, *command: object) -> str:
        """A client of SLURM; what it printed."""
        words = [str(word) for word in command]
        result = subprocess.run(words, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, f"{words}: {result.stdout}{result.stderr}\n{self._services.logs()}"
        return result.stdout

    def is_ready(self) -> bool:
        words = ["sinfo", "-h", "-N", "-o", "%t"]
        result = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        return result.stdout.split() == ["idle", "idle"]

    def submit(self, sbatch_flags: Sequence[str], flags: Sequence[str], output: Path, **environment: str) -> str:
        """`sbatch ... launch/pretrain.sbatch FLAGS` on both nodes; the job's id."""
        where = ["--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={output}"]
        words = ["sbatch", *where, *sbatch_flags, "launch/pretrain.sbatch", *flags]
        environment = {**self.environment, **environment}
        result = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        return dict(re.findall(r"(\w[\w:/]*)=(\S*)", self.run("scontrol", "show", "job", job)))

    def wait_for(self, job: str, states: Sequence[str], seconds: float = 180) -> dict[str, str]:
        found: dict[str, str] = {}

        def reached() -> bool:
            found.update(self.job(job))
            return found["JobState"] in states

        wait_until(reached, seconds, lambda: f"{found}\n{self._services.logs()}")
        return found

    def logs(self) -> str:
        return self._services.logs()

    def close(self) -> None:
        """End what jobs have left, then the cluster."""
        mark = f"SLURM_CONF={self.folder / 'slurm.conf'}\0SLURM_JOB_ID=".encode().split(b"\0")
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                variables = path.read_bytes().split(b"\0")
                if mark[0] in variables and any(variable.startswith(mark[1]) for variable in variables):
                    os.kill(int(path.parent.name), signal.SIGKILL)
        # What SLURM runs beside a job ends when the job has.
        deadline = time.monotonic() + 20
        while self._has_steps() and time.monotonic() < deadline:
            time.sleep(0.2)
        self._services.close()

    def _has_steps(self) -> bool:
        words = ["squeue", "--noheader", "--steps"]
        result = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        return bool(result.stdout.split())


# Hosts ---------------------------------------------------------------------------------------------------------------

_SSHD_CONF = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
PermitRootLogin yes
PasswordAuthentication no
StrictModes no
UsePAM no
"""


class Hosts:
    """h1 and h2: network, name, /etc/hosts and sshd of their own, a cable between them, and root's key for both."""

    ADDRESSES = ("10.77.0.1", "10.77.0.2")

    def __init__(self, folder: Path) -> None:
        need("sshd", "ssh", "ssh-keygen", "pdsh", "ip", "nsenter", "unshare")
        self.folder = folder
        self._services = Services(folder)
        for name in ("host_key", "key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(command, check=True, timeout=60)
        (folder / "sshd.conf").write_text(_SSHD_CONF.format(folder=folder))
        (folder / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 h1\n10.77.0.2 h2\n")
        (folder / "ssh").mkdir()
        (folder / "ssh" / "config").write_text(
            f"IdentityFile {folder}/key\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
        )
        for path in (Path("/run/sshd"), Path("/root/.ssh")):
            path.mkdir(exist_ok=True)
        script = (
            'hostname "$1" && mount --bind "$2/hosts" /etc/hosts && mount --bind "$2/ssh" /root/.ssh && '
            'ip link set lo up && exec /usr/sbin/sshd -D -e -f "$2/sshd.conf"'
        )
        spaces = ["unshare", "--net", "--uts", "--mount", "--propagation", "private"]
        self._hosts = [self._services.start([*spaces, "sh", "-c", script, "sh", name, folder]) for name in ("h1", "h2")]
        try:
            wait_until(lambda: all(self._listens(host.pid) for host in self._hosts), 20, self._services.logs)
            pids = [str(host.pid) for host in self._hosts]
            cable = ["ip", "link", "add", "eth0", "netns", pids[0], "type", "veth", "peer", "name", "eth0"]
            subprocess.run([*cable, "netns", pids[1]], check=True, timeout=60)
            for pid, address in zip(pids, self.ADDRESSES, strict=True):
                enter = ["nsenter", "--target", pid, "--net", "ip"]
                subprocess.run([*enter, "address", "add", f"{address}/24", "dev", "eth0"], check=True, timeout=60)
                subprocess.run([*enter, "link", "set", "eth0", "up"], check=True, timeout=60)
        except BaseException:
            self.close()
            raise

    def _listens(self, pid: int) -> bool:
        return ":0016 " in Path(f"/proc/{pid}/net/tcp").read_text()

    def on_first(self, *command: object) -> list[object]:
        """`command` as it is typed on h1."""
        return ["nsenter", "--target", self._hosts[0].pid, "--net", "--uts", "--mount", f"--wd={ROOT}", *command]

    def cut(self, *, again: bool = False) -> None:
        """Pull the cable, or plug it in again."""
        enter = ["nsenter", "--target", str(self._hosts[1].pid), "--net"]
        subprocess.run([*enter, "ip", "link", "set", "eth0", "up" if again else "down"], check=True, timeout=60)

    def logs(self) -> str:
        return self._services.logs()

    def close(self) -> None:
        """End both hosts; a session whose other side was cut off would stay, as only sshd's listener ends here."""
        sessions = [found for host in self._hosts for found in psutil.Process(host.pid).children(recursive=True)]
        self._services.close()
        for process in sessions:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


# Processes -----------------------------------------------------------------------------------------------------------


def ranks_of(run_dir: Path) -> dict[int, int]:
    """Rank -> process id of the running processes that train into `run_dir`, whatever launcher started them."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            variables = dict(
                line.split(b"=", 1) for line in (path / "environ").read_bytes().split(b"\0") if b"=" in line
            )
        except OSError:
            continue
        if b"python" not in words[0] or not any(word.endswith(b"launch/pretrain.sh") for word in words[:3]):
            continue
        if str(run_dir).encode() not in words:
            continue
        for name in (b"RANK", b"OMPI_COMM_WORLD_RANK", b"PMI_RANK", b"SLURM_PROCID"):
            if name in variables and (name != b"SLURM_PROCID" or b"SLURM_STEP_ID" in variables):
                found[int(variables[name])] = int(path.name)
                break
    return found


def are_gone(pids: Sequence[int]) -> bool:
    """Whether none of these processes runs; one that nobody has collected does not run."""

    def runs(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    return not any(runs(pid) for pid in pids)


@contextlib.contextmanager
def launched(command: Sequence[object], output: Path, **environment: str) -> Iterator[subprocess.Popen]:
    """A launcher with its output in a file; whatever it left of its own session is ended at the end."""
    with open(output, "w") as log:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env=clean_environment(**environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
