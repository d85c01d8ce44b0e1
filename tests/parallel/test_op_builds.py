"""What DeepSpeed compiles: known before the ranks meet, compiled by one of them, and a failure is one line for all."""

import json
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest
from deepspeed.ops.op_builder.builder import OpBuilder
from repository import ROOT
from training_runs import RankPool, flags_for, rank_pool, train

from minimind.config.resolve import resolve_run
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import RunConfig, TrainConfig
from minimind.errors import UserError
from minimind.parallel import op_builds
from minimind.parallel.op_builds import build_ops, compiler_message, needed_ops

BROKEN = "adam.cpp:12:3: error: 'foo' was not declared in this scope"


def resolve(ds: dict[str, Any] | str) -> ResolvedRun:
    """Of a file for a CPU, of a mapping for a GPU."""
    device = "cpu" if isinstance(ds, str) else "cuda"
    if isinstance(ds, str):
        ds = json.loads((ROOT / "ds_configs" / ds).read_text())
    return resolve_run(RunConfig(train=TrainConfig(steps=1, micro_batch_size=1)), ds, world_size=1, device_type=device)


def with_optimizer(kind: str, *, offload: bool) -> dict[str, Any]:
    zero = {"stage": 2, **({"offload_optimizer": {"device": "cpu"}} if offload else {})}
    return {"zero_optimization": zero, "optimizer": {"type": kind, "params": {"lr": 1e-3}}}


@pytest.mark.parametrize(
    ("ds", "ops"),
    [
        ("zero0.json", []),
        ("zero3.json", []),
        ("zero2_muon.json", []),  # its Adam is torch's
        ("zero2_offload.json", ["CPUAdamBuilder"]),
        ("zero3_nvme.json", ["CPUAdamBuilder", "AsyncIOBuilder"]),
        (with_optimizer("AdamW", offload=False), []),
        (with_optimizer("Lion", offload=False), ["FusedLionBuilder"]),
        (with_optimizer("Lion", offload=True), ["CPULionBuilder"]),
        (with_optimizer("Adagrad", offload=True), ["CPUAdagradBuilder"]),
    ],
    ids=str,
)
def test_a_run_s_ops_are_known_from_its_configuration(ds, ops):
    assert needed_ops(resolve(ds)) == ops


@pytest.fixture
def compiler(tmp_path, monkeypatch) -> Path:
    """A folder for builds, and a compiler that fails and notes there what it was given."""
    program = tmp_path / "c++"
    program.write_text(
        f'#!/bin/sh\ncase "$*" in *" -c "*) ;; *) exec c++ "$@";; esac\n'
        f'echo "$*" >>{tmp_path}/calls\necho "{BROKEN}" >&2\nexit 1\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(program))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    monkeypatch.setattr(op_builds, "LOOK_SECONDS", 0.1)
    return tmp_path


def test_what_does_not_build_is_one_line_with_the_compilers_last_message(compiler):
    said: list[str] = []
    with pytest.raises(UserError, match=r"DeepSpeed's cpu_adam does not build: .*'foo' was not declared") as error:
        build_ops(resolve("zero2_offload.json"), said.append)
    assert "\n" not in str(error.value) and "install a C++ compiler" in str(error.value)
    assert len(said) == 1 and "compiling DeepSpeed's cpu_adam, once on this host; usually" in said[0]


def test_the_lock_of_a_killed_build_holds_nobody_up(compiler):
    folder = compiler / "extensions" / "cpu_adam"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    began = time.monotonic()
    with pytest.raises(UserError, match="does not build"):
        build_ops(resolve("zero2_offload.json"), lambda line: None)
    assert time.monotonic() - began < 60 and not (folder / "lock").exists()


def test_what_needs_no_op_builds_none(compiler):
    build_ops(resolve("zero3.json"), pytest.fail)
    assert not (compiler / "calls").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "Error building 'x'\na.cpp:1: error: one\nb.cpp:2: fatal error: two\nninja: stopped",
            "b.cpp:2: fatal error: two",
        ),
        ("Ninja is required to load C++ extensions", "Ninja is required to load C++ extensions"),
    ],
)
def test_the_last_error_is_the_message(text, message):
    assert compiler_message(RuntimeError(text)) == message


@pytest.fixture(scope="module")
def pool():
    yield from rank_pool(2)


def train_by_broken_compiler(folder: Path, flags: list[str]) -> str:
    """What the run's error says on this rank."""
    os.environ.update(CXX=str(folder / "c++"), TORCH_EXTENSIONS_DIR=str(folder / "extensions"))
    OpBuilder._loaded_ops.clear()
    try:
        train(flags)
    except UserError as error:
        return str(error)
    return "nothing was noticed"


def test_one_rank_of_a_host_compiles_and_its_failure_is_everybody_s(pool: RankPool, compiler, tiny_corpus, tmp_path):
    flags = flags_for(
        tiny_corpus, tmp_path / "run", ds_config=ROOT / "ds_configs/zero2_offload.json", micro_batch_size=2
    )
    first, second = pool.run(train_by_broken_compiler, compiler, flags)
    assert first == second and "DeepSpeed's cpu_adam does not build" in first and "'foo'" in first
    calls = (compiler / "calls").read_text().splitlines()
    assert calls and len(calls) == len(set(calls)), "more than one rank has compiled"
