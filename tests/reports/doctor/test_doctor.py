"""The doctor: the status of each check and its fix, on this machine and on machines that are broken on purpose."""

import importlib
import os
import resource
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement

from minimind import doctor
from minimind.reports.doctor import machine, software
from minimind.reports.doctor.check import Check


def test_this_machine_is_looked_at_from_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    code = doctor.main(["--run-dir", str(tmp_path / "runs" / "new")])
    printed = capsys.readouterr().out
    for name in ("python", "torch", "deepspeed", "C++ compiler", "ninja", "build locks", "can build", "gloo", "srun",
                 "open files", "shared memory", "memory", "disk"):  # fmt: skip
        assert any(line[8:].startswith(name) for line in printed.splitlines()), name
    assert f"{torch.__version__.split('+')[0]}" in printed and "gloo               works" in printed
    assert code == int("BAD" in printed) and not (tmp_path / "runs").exists()
    assert not torch.distributed.is_initialized()


def test_a_bad_finding_is_the_exit_code(capsys, monkeypatch, tmp_path):
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (time.time() - 7200,) * 2)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert doctor.main(["--run-dir", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert f"left by a killed build: rm {lock}" in printed and "will not work" in printed.splitlines()[-1]


def test_a_young_lock_may_be_a_build_that_is_going_on(tmp_path):
    (tmp_path / "lock").touch()
    (found,) = software.check_locks(tmp_path)
    assert found.status == "warn" and "if nothing is being built now" in found.fix
    assert software.check_locks(tmp_path / "nothing")[0].status == "ok"


@pytest.mark.parametrize(
    ("requirement", "status", "words"),
    [
        ("numpy>=1.0", "ok", ""),
        ("numpy>=99", "warn", "instead of >=99"),
        ("deepspeed==0.0.1", "bad", "instead of ==0.0.1"),
        ("no-such-package-here", "bad", "not installed"),
    ],
)
def test_versions_are_compared(requirement, status, words):
    found = software.check_package(Requirement(requirement))
    assert found.status == status and words in found.what
    assert ("pip install" in found.fix) == (status != "ok")


def test_a_machine_without_tools_is_told_what_needs_them(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    compiler, ninja = software.check_ops(())[:2]
    assert compiler.status == ninja.status == "warn"
    assert "apt-get install g++" in compiler.fix and ninja.fix.startswith("pip install ninja")
    monkeypatch.setattr(software, "compute_capability", lambda device: (9, 0))
    monkeypatch.setattr(software, "find_missing_compiler", lambda device_type: "a C compiler (gcc)")
    kernels = next(check for check in software.check_ops(()) if check.name == "kernels")
    assert (kernels.status, kernels.what) == ("warn", "a C compiler (gcc) is missing") and "experts" in kernels.fix
    launchers = {check.name: check.what for check in machine.check_launchers()}
    assert launchers["srun"] == "not found; only needed for SLURM clusters"


def test_an_op_that_does_not_build_is_one_line(monkeypatch):
    def fail(verbose: bool) -> None:
        raise RuntimeError("Error building extension 'x'\nmany\nlines")

    builders = {"x": SimpleNamespace(load=fail), "y": SimpleNamespace(load=lambda verbose: None)}
    found = software.build_op("x", builders)
    assert found.status == "bad" and found.what == "does not build: Error building extension 'x'"
    assert software.build_op("y", builders).status == "ok"
    assert software.build_op("z", builders).fix == "one of x, y"


def test_a_broken_deepspeed_is_a_finding(monkeypatch):
    def refuse(name: str):
        raise ImportError("libcuda.so: not found")

    monkeypatch.setattr(importlib, "import_module", refuse)
    assert software.check_ops(())[-1] == Check(
        "deepspeed", "bad", "cannot be imported: libcuda.so: not found", "pip install it anew"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_driver_that_torch_cannot_use_is_told_from_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert software.check_accelerator()[0].status == "ok"
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    monkeypatch.setattr(torch.version, "cuda", None)
    (found,) = software.check_accelerator()
    assert found.status == "bad" and "built without CUDA" in found.what


def test_limits_memory_and_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 524288))
    assert machine.check_limits()[0].status == "ok"  # a run raises its own to the hard one
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 2048))
    found, _ = machine.check_limits()
    assert found.status == "warn" and "hard limit" in found.fix
    usage = SimpleNamespace(total=64 * 2**20, free=60 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "--shm-size" in machine.check_shared_memory(tmp_path)[0].fix
    assert machine.check_disk(tmp_path / "not" / "yet").status == "bad"
    usage.free = 5 * 2**30
    assert machine.check_disk(tmp_path).status == "warn"
    usage.free = 500 * 2**30
    assert machine.check_disk(tmp_path).status == "ok"


def test_buffers_of_killed_runs_are_found(tmp_path):
    assert [check.name for check in machine.check_shared_memory(tmp_path)] == ["shared memory"]
    (tmp_path / "deepspeed_allreduce_buffer_1_2").write_bytes(b"x" * 2048)
    left = machine.check_shared_memory(tmp_path)[1]
    assert left.what == "1 of killed runs, 2.0 KiB" and left.fix.startswith("when nothing is running: rm ")
    assert machine.check_shared_memory(Path("/no/such"))[0].status == "bad"
