"""Training on simulated GPUs: every file of ds_configs/, dense and with experts, on one and two ranks, gives the losses
of a CPU; runs continue; memory that ends is one line; an old GPU trains in what it has."""

from pathlib import Path

import pytest
from repository import ROOT
from simulated_cuda import Machine
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
from training_runs import EXPERTS, flags_for, losses, train

# Offload has its Adam compiled for a machine with CUDA, which takes minutes; NVMe needs libaio.
LEFT_OUT = ("zero2_offload", "zero3_offload", "zero3_nvme")
FILES = sorted({path.stem for path in (ROOT / "ds_configs").glob("*.json")} - {*LEFT_OUT})
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}
KINDS: dict[str, dict] = {"dense": {}, "experts": EXPERTS}
REFUSED = [("zero3_hpz", "experts")]
CASES = [(file, kind) for file in FILES for kind in KINDS if (file, kind) not in REFUSED]
STAGES = ("zero1", "zero2", "zero3")


def flags(corpus: Path, run_dir: Path, file: str, precision: str, kind: str = "dense", **others) -> list[str]:
    ds_config = ROOT / "ds_configs" / f"{file}.json"
    settings = {"steps": 3, "save_every": 0, "precision": precision, **KINDS[kind], **others}
    return flags_for(corpus, run_dir, **settings, ds_config=ds_config)


@pytest.fixture(scope="module")
def on_cpu(tiny_corpus, tmp_path_factory):
    """The losses of a CPU: the same at every stage, so made once for each optimizer, kind and precision."""
    made: dict[tuple[bool, str, str], dict[int, float]] = {}

    def reference(file: str, kind: str, precision: str) -> dict[int, float]:
        key = ("muon" in file, kind, precision)
        if key not in made:
            run_dir = tmp_path_factory.mktemp("cpu") / "run"
            assert train(flags(tiny_corpus, run_dir, file if key[0] else "zero1", precision, kind))[0] == 0
            made[key] = losses(run_dir)
        return made[key]

    return reference


def check_losses(ranks, corpus, run_dir, reference, file, kind, precision):
    (code, printed), *_ = ranks.run(train, flags(corpus, run_dir, file, precision, kind))
    assert code == 0 and "x cuda" in printed
    expected = reference(file, kind, precision)
    assert losses(run_dir) == pytest.approx(expected, rel=TOLERANCE[precision])


@pytest.mark.parametrize(("file", "kind"), CASES)
def test_one_gpu_gives_the_losses_of_a_cpu(one_gpu, tiny_corpus, tmp_path, on_cpu, file, kind):
    check_losses(one_gpu, tiny_corpus, tmp_path / "run", on_cpu, file, kind, "fp32")


@pytest.mark.parametrize(("file", "kind"), CASES)
def test_two_gpus_give_the_losses_of_a_cpu(two_gpus, tiny_corpus, tmp_path, on_cpu, file, kind):
    check_losses(two_gpus, tiny_corpus, tmp_path / "run", on_cpu, file, kind, "bf16")


def test_a_killed_run_continues(one_gpu, two_gpus, tiny_corpus, tmp_path):
    def run(name: str, file: str) -> tuple[Path, list[str]]:
        return tmp_path / name, flags(tiny_corpus, tmp_path / name, file, "bf16", steps=6, save_every=2)

    whole, given = run("whole", "zero2")
    two_gpus.run(train, given)
    cut, given = run("cut", "zero2")
    two_gpus.run(train, given)
    (code, printed), *_ = one_gpu.run(resume, run("cut", "zero3")[1], cut, 2)  # another stage, fewer ranks
    assert code == 0 and "resumed from" in printed
    assert losses(cut) == pytest.approx(losses(whole), rel=2e-3)


@pytest.mark.parametrize("moment", MOMENTS)
def test_memory_that_ends_is_one_line(one_gpu, tiny_corpus, tmp_path, moment):
    given = flags(tiny_corpus, tmp_path, "zero1", "bf16", steps=2, save_every=1, eval_every=1, global_batch_size=1)
    (said,) = one_gpu.run(run_out_of_memory, moment, given)
    assert said.startswith("cuda:0 is out of memory at step ") and "\n" not in said
    assert "tensors hold" in said and "--seq-len" in said


# Waits of the host.


@pytest.mark.parametrize("ranks", ["one_gpu", "two_gpus"])
@pytest.mark.parametrize("file", STAGES)
def test_the_host_does_not_wait_for_the_device(request, tiny_corpus, tmp_path, file, ranks):
    given = flags(tiny_corpus, tmp_path, file, "bf16", steps=24, global_batch_size=2, log_every=10, document_mask=True)
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
    assert "this GPU has no variable-length attention" in printed


def test_compiling_needs_triton_and_says_so(one_gpu, tiny_corpus, tmp_path):
    (said,) = one_gpu.run(compile_without_triton, flags(tiny_corpus, tmp_path / "run", "zero1", "bf16"))
    assert said == "compile: on, and Triton (pip install triton) is missing; install it, or take --compile off"


def test_a_rank_that_sees_one_device_of_two_takes_it(two_gpus, tiny_corpus, tmp_path, on_cpu):
    """`CUDA_VISIBLE_DEVICES=$SLURM_LOCALID` for each task, and what `srun --gpus-per-task=1` does."""
    (code, printed), *_ = two_gpus.run(train_seeing_one, flags(tiny_corpus, tmp_path / "run", "zero3", "fp32"))
    assert code == 0 and "2 x cuda" in printed
    assert losses(tmp_path / "run") == pytest.approx(on_cpu("zero3", "dense", "fp32"), rel=1e-5)
