"""Where the system is not Linux: no /proc, no core masks, no prctl, macOS's limits, its gloo. Each answer exchanged."""

import ctypes
import os
import resource
import subprocess
import sys
import time
from io import BytesIO
from types import SimpleNamespace

import psutil
import pytest
import torch
from repository import ROOT

from data_prep.reading import byte_stream, sources
from minimind import host
from minimind.accelerator import accelerator_type
from minimind.config.deepspeed_file import load_ds_config
from minimind.config.resolve import resolve_run
from minimind.config.run_config import RunConfig
from minimind.distributed import process_group
from minimind.distributed.environment import RankEnvironment
from minimind.distributed.launchers import deepspeed as several_hosts
from minimind.distributed.launchers.local import end_with_parent
from minimind.errors import UserError
from minimind.files import raise_open_files
from minimind.parallel.op_builds import needed_ops
from minimind.reports.doctor import machine


@pytest.fixture
def mac(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "darwin")
    for module in (host, byte_stream, sources):
        monkeypatch.setattr(module, "PROC", tmp_path / "proc")


def test_cores_and_memory_are_told_without_proc(mac, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert host.count_cores() == os.cpu_count()
    host.forget_peak()
    usage = SimpleNamespace(ru_maxrss=5)
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    assert host.peak_memory() == 5, "macOS counts bytes"
    monkeypatch.setattr(sys, "platform", "freebsd")
    assert host.peak_memory() == 5 * 1024


def test_on_linux_the_peak_is_forgotten():
    """In a process of its own: a rank of an earlier test may have told this one to keep what it frees."""
    code = """
from minimind import host
import psutil
pieces = [b"1" * 2**28]
before = host.peak_memory()
pieces.clear()
host.forget_peak()
print(before, host.peak_memory(), psutil.Process().memory_info().rss)
"""
    before, now, held = map(int, subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split())
    assert before - now > 2**27 and abs(now - held) < 2**26


def test_the_start_of_the_machine_is_asked_of_sysctl(mac, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert host.boot_id() == ""
    (tmp_path / "sysctl").write_text('#!/bin/sh\n[ "$*" = "-n kern.bootsessionuuid" ] && echo 1F2E\n')
    (tmp_path / "sysctl").chmod(0o755)
    assert host.boot_id() == "1F2E"


def test_an_accelerator_that_torch_cannot_hide_is_hidden_as_from_deepspeed(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    assert accelerator_type() == "mps"
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert accelerator_type() is None


def test_as_many_files_are_opened_as_the_kernel_can_hold(monkeypatch):
    limits = [(256, resource.RLIM_INFINITY)]

    def set_limits(what, wanted):
        if wanted[0] > 61_440:  # macOS's kern.maxfilesperproc, whatever the hard limit says
            raise ValueError("current limit exceeds maximum limit")
        limits[0] = wanted

    monkeypatch.setattr(resource, "getrlimit", lambda what: limits[0])
    monkeypatch.setattr(resource, "setrlimit", set_limits)
    assert raise_open_files() == limits[0][0] == 32_768
    limits[0] = (61_440, resource.RLIM_INFINITY)
    assert raise_open_files() == 61_440


def test_gloo_is_told_what_that_of_macos_knows(mac, monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    one_host = RankEnvironment(rank=1, local_rank=1, world_size=2, local_world_size=2)
    with process_group._told_by_environment(one_host, torch.device("cpu")):
        assert (os.environ["TORCH_GLOO_LAZY_INIT"], os.environ["GLOO_SOCKET_IFNAME"]) == ("0", "lo0")
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    with process_group._told_by_environment(RankEnvironment(world_size=2), torch.device("cpu")):
        assert "GLOO_SOCKET_IFNAME" not in os.environ, "two hosts do not meet on the loopback"


def test_a_rank_starts_without_prctl(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    assert end_with_parent() is None


def test_standard_input_lies_in_a_named_file_where_descriptors_have_no_path(mac, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=BytesIO(b'{"text": "a"}\n')))
    (source,) = sources.resolve_sources(["-"], default_format="jsonl")
    for _ in range(2):
        with byte_stream.open_source(source) as (stream, _):
            assert stream.read() == b'{"text": "a"}\n'
    assert not source.path.startswith("/proc")


def test_what_only_linux_has_is_refused_in_one_line(mac):
    with pytest.raises(
        UserError, match=r"launch/deepspeed: Linux alone has it, and this is darwin; on one machine: bash"
    ):
        several_hosts.main(["--hostfile", "hosts", "script"])
    ds = load_ds_config(str(ROOT / "ds_configs" / "zero3_nvme.json"))
    run = RunConfig.from_dict({"model": {"preset": "tiny"}, "data": {}, "train": {"steps": 1}})
    with pytest.raises(UserError, match=r'offload to nvme: Linux alone has it, .*; take "device": "cpu"'):
        needed_ops(resolve_run(run, ds, world_size=1, device_type="cpu"))


def test_the_doctor_asks_for_shared_memory_on_linux_alone(mac, tmp_path):
    assert machine.check_shared_memory(tmp_path / "none") == []


def test_a_benchmark_that_takes_too_long_is_ended_with_all_it_has_started():
    def limited(minutes: float, program: str) -> int:
        command = [sys.executable, "benchmarks/limit.py", str(minutes), "sh", "-c", program]
        return subprocess.run(command, cwd=ROOT, check=False).returncode

    assert limited(1, "exit 3") == 3
    assert limited(1, "kill -9 $$") == 137
    mark = f"{600 + time.time():.3f}"  # seconds that nobody else sleeps for
    assert limited(0.005, f"sleep {mark} & sleep {mark}") == 124
    assert not [one for one in psutil.process_iter(["cmdline"]) if mark in (one.info["cmdline"] or [])]
