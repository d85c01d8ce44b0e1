"""Every file of ds_configs/, dense and with experts, on one and two GPUs and in each precision, has a CPU's losses."""

import itertools
import subprocess
import sys

import pytest
from repository import ROOT
from simulated_cuda import Machine
from simulated_ranks import gpu_environment, simulated_ranks
from training_runs import EXPERTS, flags_for, losses, train

FILES = sorted({path.stem for path in (ROOT / "ds_configs").glob("*.json")} - {"zero3_nvme"})  # it needs libaio
KINDS: dict[str, dict] = {"dense": {}, "experts": EXPERTS}
# Relative, of three losses. A CPU has no fp16: those are compared with its float32, from which they differ by the
# rounding of weights and activations to 11 bits, 2^-12 each; bf16 has 8, and rounds on both sides.
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3, "fp16": 5e-4}


def is_refused(file: str, kind: str, precision: str) -> bool:
    """By the run itself."""
    return kind == "experts" and (file == "zero3_hpz" or (file == "zero0" and precision == "fp16"))


CASES = [
    pytest.param(*case, id=" ".join(case))
    for case in itertools.product(("one_gpu", "two_gpus"), FILES, KINDS, TOLERANCE)
    if not is_refused(*case[1:])
]


@pytest.fixture(scope="module")
def reference(tiny_corpus, tmp_path_factory):
    """The losses of a CPU: the same at every stage, so made once for each optimizer, kind and precision."""
    made: dict[tuple[bool, str, str], dict[int, float]] = {}
    ranks = simulated_ranks(1, Machine(devices=0))
    one_cpu = next(ranks)

    def get(file: str, kind: str, precision: str) -> dict[int, float]:
        key = ("muon" in file, kind, precision.replace("fp16", "fp32"))
        if key not in made:
            folder = tmp_path_factory.mktemp("cpu")
            made[key] = run(one_cpu, tiny_corpus, folder, "zero2_muon" if key[0] else "zero1", *key[1:])[1]
        return made[key]

    yield get
    next(ranks, None)


@pytest.fixture(scope="module")
def cpu_adam():
    """DeepSpeed's Adam of the host: a minute or two of compiling, once, before ranks wait for it."""
    code = "from engine_runs import resolve; from minimind.parallel.op_builds import build_ops\n"
    code += "offload = {'stage': 2, 'offload_optimizer': {'device': 'cpu'}}\n"
    code += "build_ops(resolve(2, ds={'zero_optimization': offload}), print)"
    subprocess.run([sys.executable, "-c", code], env=gpu_environment(1), check=True)


def run(ranks, corpus, folder, file: str, kind: str, precision: str) -> tuple[str, dict[int, float]]:
    settings = {"steps": 3, "save_every": 0, "eval_every": 0, "lr": 5e-4, "precision": precision, **KINDS[kind]}
    flags = flags_for(corpus, folder, ds_config=ROOT / "ds_configs" / f"{file}.json", **settings)
    (code, printed), *_ = ranks.run(train, flags)
    assert code == 0
    return printed, losses(folder)


@pytest.mark.gpu
@pytest.mark.parametrize(("gpus", "file", "kind", "precision"), CASES)
def test_gpus_give_the_losses_of_a_cpu(
    request, tiny_corpus, tmp_path, reference, record_property, gpus, file, kind, precision
):
    if "offload" in file:
        request.getfixturevalue("cpu_adam")
    expected = reference(file, kind, precision)
    printed, found = run(request.getfixturevalue(gpus), tiny_corpus, tmp_path, file, kind, precision)
    assert " x cuda" in printed
    record_property("difference", f"{max(abs(found[step] / expected[step] - 1) for step in expected):.1e}")
    assert found == pytest.approx(expected, rel=TOLERANCE[precision])
