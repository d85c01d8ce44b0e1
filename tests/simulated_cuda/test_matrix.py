"""Every file of ds_configs/, dense and with experts, on one and two GPUs and in each precision, has a CPU's losses."""

import itertools
import subprocess
import sys

import pytest
from matrix_runs import TOLERANCE, cpu_reference, run
from repository import ROOT
from simulated_ranks import gpu_environment

FILES = sorted({path.stem for path in (ROOT / "ds_configs").glob("*.json")} - {"zero3_nvme"})  # it needs libaio


def is_refused(file: str, kind: str, precision: str) -> bool:
    """By the run itself."""
    return kind == "experts" and (file == "zero3_hpz" or (file == "zero0" and precision == "fp16"))


CASES = [
    pytest.param(*case, id=" ".join(case))
    for case in itertools.product(("one_gpu", "two_gpus"), FILES, ("dense", "experts"), TOLERANCE)
    if not is_refused(*case[1:])
]


@pytest.fixture(scope="module")
def reference(tiny_corpus, tmp_path_factory):
    yield from cpu_reference(tiny_corpus, tmp_path_factory.mktemp)


@pytest.fixture(scope="module")
def cpu_adam():
    """DeepSpeed's Adam of the host: a minute or two of compiling, once, before ranks wait for it."""
    code = "from engine_runs import resolve; from minimind.parallel.op_builds import build_ops\n"
    code += "offload = {'stage': 2, 'offload_optimizer': {'device': 'cpu'}}\n"
    code += "build_ops(resolve(2, ds={'zero_optimization': offload}), print)"
    subprocess.run([sys.executable, "-c", code], env=gpu_environment(1), check=True)


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
