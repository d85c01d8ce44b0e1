"""Training on simulated GPUs: killed runs continue; memory that ends is one line; the host does not wait; an old GPU
trains in what it has. test_matrix.py compares losses with a CPU's."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT
from simulated_device import Machine
from simulated_ranks import gpu_environment
from simulated_runs import (
    MOMENTS,
    compile_without_triton,
    count_waits,
    resume,
    run_out_of_memory,
    spoil_a_step,
    train_on,
    train_seeing_one,
)
from training_runs import flags_for, losses, train

STAGES = ("zero1", "zero2", "zero3")


def flags(corpus: Path, run_dir: Path, file: str, precision: str, **others) -> list[str]:
    settings = {"steps": 3, "save_every": 0, "precision": precision, **others}
    return flags_for(corpus, run_dir, **settings, ds_config=ROOT / "ds_configs" / f"{file}.json")


@pytest.mark.gpu
def test_a_killed_run_continues(one_gpu, tiny_corpus, tmp_path):
    """Killed in the middle of a step by SIGKILL, then begun again by the same command."""
    whole, cut = (flags(tiny_corpus, tmp_path / name, "zero2", "bf16", steps=6, save_every=2) for name in "ab")
    one_gpu.run(train, whole)
    command = [
        sys.executable,
        "-c",
        "import sys, simulated_runs; simulated_runs.train_until_killed(*sys.argv[1:])",
        "5",
    ]
    done = subprocess.run([*command, *cut], env=gpu_environment(1), capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-1000:]
    ((code, printed),) = one_gpu.run(train, cut)
    assert code == 0 and "resumed from" in printed
    assert losses(tmp_path / "b") == losses(tmp_path / "a")


def test_a_run_continues_at_another_stage_on_fewer_gpus(one_gpu, two_gpus, tiny_corpus, tmp_path):
    def given(name: str, file: str) -> list[str]:
        return flags(tiny_corpus, tmp_path / name, file, "bf16", steps=6, save_every=2)

    two_gpus.run(train, given("whole", "zero2"))
    two_gpus.run(train, given("cut", "zero2"))
    (code, printed), *_ = one_gpu.run(resume, given("cut", "zero3"), tmp_path / "cut", 2)
    assert code == 0 and "resumed from" in printed
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=2e-3)


@pytest.mark.parametrize(
    ("file", "precision", "shared"),
    [
        ("zero2", "bf16", "sp_size"),
        ("zero3", "fp16", "sp_size"),
        ("zero1", "fp16", "tp_size"),
        ("zero3", "bf16", "tp_size"),
    ],
)
def test_ranks_that_share_lose_what_others_lose(two_gpus, tiny_corpus, tmp_path, file, precision, shared):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    for size in (1, 2):
        settings = {"document_mask": True, **heads, shared: size}
        two_gpus.run(train, flags(tiny_corpus, tmp_path / str(size), file, precision, **settings))
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=5e-3)


@pytest.mark.parametrize("moment", MOMENTS)
def test_memory_that_ends_is_one_line(one_gpu, tiny_corpus, tmp_path, moment):
    given = flags(tiny_corpus, tmp_path, "zero1", "bf16", steps=2, save_every=1, eval_every=1, global_batch_size=1)
    (said,) = one_gpu.run(run_out_of_memory, moment, given)
    assert said.startswith("cuda:0 is out of memory at step ") and "\n" not in said
    assert "tensors hold" in said and "--seq-len" in said


# Waits of the host.


@pytest.mark.parametrize(
    ("ranks", "file", "sp_size"),
    [*((ranks, file, 1) for ranks in ("one_gpu", "two_gpus") for file in STAGES), ("two_gpus", "zero2", 2)],
)
def test_the_host_does_not_wait_for_the_device(request, tiny_corpus, tmp_path, file, ranks, sp_size):
    shared = {"document_mask": True, "sp_size": sp_size}
    # On two, of a mixture: its losses by source are among what is not waited for.
    corpus = tiny_corpus if ranks == "one_gpu" else (f"web={tiny_corpus}:1",)
    given = flags(corpus, tmp_path, file, "bf16", steps=24, global_batch_size=2, log_every=10, **shared)
    for found in request.getfixturevalue(ranks).run(count_waits, given, 11, 20):
        assert found["code"] == 0 and found["all"] == {}


@pytest.mark.parametrize("file", STAGES)
def test_a_nan_is_found_on_the_device_and_changes_nothing(two_gpus, tiny_corpus, tmp_path, file):
    given = flags(tiny_corpus, tmp_path / "run", file, "bf16", steps=4, skip_bad_steps=1)
    (printed, *_), *others = found = two_gpus.run(spoil_a_step, given, 3)
    assert len(others) == 1 and all(is_left_alone for _, is_left_alone in found)
    assert "step 3: gradient norm is" in printed and "weights left as they were (1 of 1 allowed)" in printed
    assert losses(tmp_path / "run")[4] < losses(tmp_path / "run")[1] + 0.2


def test_an_old_gpu_trains_in_fp16_and_says_what_it_lacks(one_gpu, tiny_corpus, tmp_path):
    given = flags(tiny_corpus, tmp_path, "zero1", "fp16", document_mask=True)
    at = given.index("--precision")
    ((code, printed),) = one_gpu.run(train_on, Machine("T4"), given[:at] + given[at + 2 :])
    assert code == 0 and "1 x cuda, fp16" in printed
    assert "no variable-length attention here" in printed


def test_compiling_needs_triton_and_says_so(one_gpu, tiny_corpus, tmp_path):
    (said,) = one_gpu.run(compile_without_triton, flags(tiny_corpus, tmp_path / "run", "zero1", "bf16"))
    assert said == "compile: on, and Triton (pip install triton) is missing; install it, or take --compile off"


def test_a_rank_that_sees_one_device_of_two_takes_it(two_gpus, tiny_corpus, tmp_path):
    """`CUDA_VISIBLE_DEVICES=$SLURM_LOCALID` for each task, and what `srun --gpus-per-task=1` does."""
    (code, printed), *_ = two_gpus.run(train_seeing_one, flags(tiny_corpus, tmp_path / "one", "zero3", "fp32"))
    assert code == 0 and "2 x cuda" in printed
    two_gpus.run(train, flags(tiny_corpus, tmp_path / "both", "zero3", "fp32"))
    assert losses(tmp_path / "one") == losses(tmp_path / "both")
