"""benchmarks/gpu.sh: its refusal without a GPU, and a short rehearsal of what it runs, on a simulated one."""

import json
import os
import subprocess
import sys

from repository import ROOT
from simulated_device import Machine, environment


def test_without_a_gpu_it_says_so_in_a_line():
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", "benchmarks/gpu.sh"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("no GPU: ") and done.stderr.count("\n") == 1


def test_a_short_rehearsal_leaves_a_page_that_says_what_it_is(tmp_path):
    env = {**environment(Machine()), "BENCHMARKS_OUT": str(tmp_path)}

    def run(script: str, *flags: str) -> None:
        command = [sys.executable, f"benchmarks/{script}", *flags]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]

    shape = ["--seq-len", "32", "--micro-batch-size", "1", "--steps", "2"]
    run("step.py", "--models", "tiny", "--ways", "documents", "compiled", *shape)
    run("gpu.py", "--megabytes", "1", "--size", "64", "--rounds", "1")
    (tmp_path / "tests.xml").write_text(
        '<testsuite><testcase name="a" time="1"><properties><property name="planned" value="7 MiB"/></properties>'
        '</testcase><testcase name="b" time="2"><failure/></testcase></testsuite>'
    )
    (tmp_path / "failed.txt").write_text("experts.py (exit code 1)\n")
    run("gpu.py", "--page", str(tmp_path / "gpu.md"))
    page, content = (tmp_path / "gpu.md").read_text(), json.loads((tmp_path / "gpu.json").read_text())
    assert "no figure below was measured on a GPU" in page and content["rehearsal"]
    assert "1 of 2 tests passed" in page and "| a | passed | planned 7 MiB |" in page and "| b | failure |" in page
    assert "- failed or not run: experts.py (exit code 1)" in page
    assert {script["script"] for script in content["scripts"]} == {"step", "device_1"}
    for script in content["scripts"]:
        assert "H100" in script["environment"]["machine"] and script["environment"]["date"] in page
    (found,) = next(script for script in content["scripts"] if script["script"] == "step")["measured"].values()
    # Ours are none; DeepSpeed's are those of test_training.py.
    assert 0 <= found["waits"] <= 4 and found["memory"] > 0 and sum(found["shares"].values()) > 0.9
