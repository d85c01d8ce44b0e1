"""The memory estimate against what real training steps held, in a process of their own: states within 10%, the peak of
a step within 20%."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_trial import resolve_case
from repository import ROOT

from minimind.reports.plan.memory import estimate_memory


def case(stage: int, precision: str, preset: str = "quickstart", **others: Any) -> dict[str, Any]:
    train = {"precision": precision, "micro_batch_size": 4, **others.pop("train", {})}
    return {"preset": preset, "stage": stage, "seq_len": 128, "train": train, **others}


WIDE = {"hidden_size": 512, "num_hidden_layers": 3}
EXPERTS = {"num_hidden_layers": 2, "hidden_size": 512, "num_experts": 6, "moe_intermediate_size": 640}
CASES = [
    case(0, "fp32", model=WIDE),
    case(0, "bf16", model=WIDE),
    case(1, "fp32", model=WIDE, train={"gradient_accumulation_steps": 2}),
    case(1, "bf16", model=WIDE, train={"micro_batch_size": 12}),
    case(2, "fp32", model=WIDE, zero={"reduce_bucket_size": 2_000_000}, train={"gradient_accumulation_steps": 2}),
    case(2, "bf16", model=WIDE),
    case(3, "fp32", model=WIDE, zero={"reduce_bucket_size": 500_000}),
    case(1, "fp32", model={"num_hidden_layers": 10}, train={"micro_batch_size": 16, "activation_checkpointing": True}),
    case(1, "fp32", "minimind3-moe", model=EXPERTS),
    case(1, "fp32", model=WIDE, train={"lora_rank": 8}),
]


def run_cases(cases: list[dict[str, Any]]) -> list[dict[str, int]]:
    command = [sys.executable, str(ROOT / "tests" / "support" / "memory_trial.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, input=json.dumps(cases), capture_output=True, text=True, cwd=ROOT, env=environment, timeout=500
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def measured() -> list[dict[str, int]]:
    return run_cases(CASES)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux's /proc")
@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_estimate_is_what_a_step_holds(measured, number):
    estimate, found = estimate_memory(resolve_case(CASES[number], "cpu"), "cpu"), measured[number]
    states = estimate.parameters + estimate.gradients + estimate.optimizer
    assert states == pytest.approx(found["states"], rel=0.10), (states / 2**20, found["states"] / 2**20)
    assert estimate.total == pytest.approx(found["peak"], rel=0.20), (estimate.total / 2**20, found["peak"] / 2**20)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_estimate_is_what_a_gpu_allocates(measured, number, record_property):
    planned, peak = estimate_memory(resolve_case(CASES[number], "cuda"), "cuda").total, measured[number]["peak"]
    record_property("peak over plan", f"{peak / planned:.2f}")
    assert planned == pytest.approx(peak, rel=0.20)
