"""`--prove`: a real proof of this machine, and every check on runs that are broken on purpose."""

import getpass
import json
import os
import socket
import sys
import tempfile
import time
from pathlib import Path

import pytest
from small_proof import is_nameless, prove_little

from minimind import doctor
from minimind.accelerator import default_device
from minimind.checkpoints.folder import checkpoint_name, checkpoints_folder
from minimind.errors import UserError
from minimind.reports.doctor import finding, proof_runs
from minimind.reports.doctor.proof_runs import ProofRuns, SmallRun
from minimind.reports.plan.child_run import ChildRun
from minimind.training.record.events import write_event


@pytest.mark.slow
def test_this_machine_is_proven(tmp_path, capsys):
    assert prove_little(str(tmp_path)) == 0
    proof = json.loads((tmp_path / "prove.json").read_text())
    found = {check["name"]: check for check in proof["checks"]}
    statuses = {name: check["status"] for name, check in found.items() if name not in ("bf16", "dense, bf16")}
    passed = dict.fromkeys(("dense, fp32", "resume", "speed", "memory", "ZeRO 2, two ranks"), "passed")
    assert statuses == passed | {"fp16": "skipped", "compiled": "skipped"}
    assert found["resume"]["figures"] == {"loss": 0.0, "grad_norm": 0.0}
    # The plain model adds in another order: no difference would mean that it was the same one.
    assert 0 < found["dense, fp32"]["figures"]["loss"] < 1e-5
    assert found["speed"]["figures"]["tokens_per_second"] > 0 < found["memory"]["figures"]["measured_bytes"]
    assert not {"simulated", "driver"} & {name for name, value in proof["machine"].items() if value}
    assert is_nameless(tmp_path, socket.gethostname(), str(Path.home()), str(tmp_path), tempfile.gettempdir())
    page, printed = (tmp_path / "prove.md").read_text(), capsys.readouterr().out
    assert all(f"| {name} | {found[name]['status']} |" in page and f"  {name}" in printed for name in found)


def records(spoil: float = 0.0) -> list:
    shared = {"grad_norm": 1.0, "tokens_per_second": 1e5, "mfu": 0.4, "peak_memory_bytes": 2**29}
    return [{"step": step, "loss": 6 - step / 10 + spoil * step, **shared} for step in range(1, 31)]


class Runs:
    """In place of real runs; `spoiled` breaks one of them."""

    def __init__(self, spoiled: str = "") -> None:
        self.spoiled = spoiled

    def __call__(self, run, folder, *, ranks=1, variables=None, seconds=None, is_enough=None) -> ChildRun:
        run_dir = Path(run.train.run_dir)
        kind = "resume" if run_dir.exists() else "plain" if "MINIMIND_KERNELS" in (variables or {}) else "run"
        if run.train.steps == 10_000:
            kind = "memory" if variables else "speed"
        if ranks > 1:
            kind = "ranks"
        elif run.model.use_moe and kind == "run":
            kind = "experts"
        for step in (3, 6):
            (checkpoints_folder(run_dir) / checkpoint_name(step)).mkdir(parents=True, exist_ok=True)
        if kind == "resume" and self.spoiled != "begin anew":
            write_event(run_dir, "resume", 3, "")
        if self.spoiled == f"kill {kind}":
            return ChildRun(-9, "", [])
        if self.spoiled == f"end {kind}":
            return ChildRun(2, f"a warning\nerror: {Path.home()}/runs/x: full on {socket.gethostname()}\n", [])
        if self.spoiled == f"hang {kind}":
            return ChildRun(None, "", records()[:2])
        made = records(1e-3 if self.spoiled == kind else 0.0)
        if self.spoiled == f"NaN {kind}":
            made[2]["loss"] = None
        if kind == "memory":
            extra = 2**40 if self.spoiled == "memory" else 2**26
            return ChildRun(None, "", [one | {"peak_memory_bytes": 2**29 + extra} for one in made])
        return ChildRun(0, "", made[: 30 if kind == "speed" else 6])


@pytest.fixture
def prove(monkeypatch, tmp_path):
    monkeypatch.setattr(proof_runs, "SIZES", ("tiny",))
    monkeypatch.setattr(finding, "cpu_name", lambda: "a processor")

    def run(runs, *flags: str) -> tuple[int, dict[str, dict]]:
        monkeypatch.setattr(proof_runs, "train_in_child", runs)
        code = doctor.main(["--prove", "--output", str(tmp_path), *flags])
        checks = json.loads((tmp_path / "prove.json").read_text())["checks"]
        return code, {check["name"]: check for check in checks}

    return run


def test_a_sound_machine_passes(prove, capsys):
    code, found = prove(Runs())
    assert code == 0 and {check["status"] for check in found.values()} == {"passed", "skipped"}
    printed = capsys.readouterr().out.replace("\r", "\n").splitlines()
    assert "  resume               passed   loss 0 (at most 0), grad norm 0 (at most 0); from step 3 of 6" in printed


@pytest.mark.parametrize(
    ("spoiled", "name", "words"),
    [
        ("run", "dense, fp32", ""),
        ("experts", "experts, fp32", ""),
        ("NaN experts", "experts, fp32", "step 3: loss is None, and should be 5.7"),
        ("kill experts", "experts, fp32", "ended by SIGKILL"),
        ("hang experts", "experts, fp32", "no end after 200 s"),
        ("resume", "resume", "from step 3 of 6"),
        ("begin anew", "resume", "the run did not go on from its checkpoint of step 3"),
        ("end resume", "resume", "x: full on HOST"),
        ("kill plain", "dense, fp32", "the plain model on the CPU: ended by SIGKILL"),
        ("end speed", "speed", "x: full on HOST"),
        ("hang speed", "speed", "tiny: 2 steps in 240 s; give more --minutes"),
        ("memory", "memory", "tiny"),
        ("ranks", "ZeRO 3, two ranks", ""),
        ("end ranks", "ZeRO 1, two ranks", "x: full on HOST"),
    ],
)
def test_what_is_broken_fails(prove, tmp_path, spoiled, name, words):
    code, found = prove(Runs(spoiled))
    assert code == 1 and (found[name]["status"], found[name]["note"]) == ("failed", words)
    if spoiled in ("run", "experts", "resume", "ranks"):
        figures, bounds = found[name]["figures"], found[name]["bounds"]
        assert figures["loss"] > bounds["loss"] and figures["grad_norm"] == 0
    assert is_nameless(tmp_path, socket.gethostname(), str(Path.home()))


def test_time_that_is_over_is_no_failure_and_no_proof(prove):
    code, found = prove(Runs(), "--minutes", "1e-9")
    assert code == 1 and {check["status"] for check in found.values()} == {"skipped"}


def test_an_output_that_cannot_be_written_is_said_first(prove, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        prove(None, "--output", str(tmp_path / "file"))


def make_python(monkeypatch, folder: Path, script: str) -> None:
    """A program in place of this interpreter."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'error: lr: no' >&2; echo later >&2; exit 2", "lr: no"),
        ("echo 'Traceback' >&2; echo 'ValueError: x' >&2; echo '[W1] torch warns' >&2; exit 1", "ValueError: x"),
        ("kill -9 $$", "ended by SIGKILL"),
        ("exit 3", "nothing was said"),
        ("sleep 60", "no end after 1 s"),
    ],
)
def test_how_a_run_has_failed_is_one_line(monkeypatch, tmp_path, script, words):
    make_python(monkeypatch, tmp_path, f"exec 2>&2; {script}")
    runs = ProofRuns(default_device(), tmp_path, time.monotonic() + 3)
    with pytest.raises(UserError, match=f"^{words}$"):
        runs.small(SmallRun("dense"))


def test_an_interrupt_ends_the_run_and_writes_nothing(monkeypatch, tmp_path):
    make_python(monkeypatch, tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 60")

    sleep = time.sleep

    def interrupt(seconds: float) -> None:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise KeyboardInterrupt
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", interrupt)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with pytest.raises(KeyboardInterrupt):
        doctor.main(["--prove", "--output", str(tmp_path / "out")])
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert not list((tmp_path / "out").iterdir()) and not list((tmp_path / "temporary").iterdir())


def test_names_are_left_out(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    monkeypatch.setattr(getpass, "getuser", lambda: "anna")
    text = "/home/anna/runs/a b.json: rank 1 on node7, ~/x, of anna: 1/2 of 3 tokens/s in '/tmp/y/z'"
    assert finding.without_names(text) == "a b.json: rank 1 on HOST, x, of USER: 1/2 of 3 tokens/s in 'z'"
