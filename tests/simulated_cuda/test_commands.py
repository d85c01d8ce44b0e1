"""Every command that computes, on a simulated GPU, against the CPU."""

import dataclasses
import json
import subprocess
import sys

import pytest
from repository import ROOT
from simulated_device import Machine, environment
from simulated_runs import evaluate_waits, generate_waits, run_command, use_export
from tokenizers_for_tests import save_byte_level
from training_runs import EXPERTS, flags_for, train

from minimind.data.tokenizer import load_tokenizer
from minimind.model import PRESETS, MiniMindForCausalLM


@pytest.fixture(scope="module")
def run_dir(one_gpu, tiny_corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    settings = {"steps": 2, "vocab_size": 400, "initializer_range": 0.3, "device": "cuda"}
    one_gpu.run(train, flags_for(tiny_corpus, folder, **settings))
    return folder


@pytest.mark.gpu
def test_evaluation_is_that_of_a_cpu(one_gpu, run_dir, tiny_corpus, tmp_path):
    found = []
    for device in ("cuda", "cpu"):
        output = tmp_path / f"{device}.json"
        flags = ["--checkpoint", str(run_dir), "--shards", str(tiny_corpus), "--output", str(output)]
        one_gpu.run(run_command, "evaluate", *flags, "--seq-len", "16", "--device", device, "--precision", "fp32")
        found.append(json.loads(output.read_text())["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_answers_are_those_of_a_cpu(one_gpu, tmp_path):
    tokenizer = load_tokenizer(save_byte_level(tmp_path / "model"))
    config = dataclasses.replace(PRESETS["tiny"], vocab_size=tokenizer.vocab_size, initializer_range=0.3)
    MiniMindForCausalLM(config).save_pretrained(tmp_path / "model")
    (tmp_path / "questions.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b a"}\n{"prompt": "c"}\n')
    flags = [
        "--checkpoint",
        str(tmp_path / "model"),
        "--input",
        str(tmp_path / "questions.jsonl"),
        "--precision",
        "fp32",
    ]
    flags += ["--max-new-tokens", "6", "--max-batch-size", "2"]
    for device in ("cuda", "cpu"):
        one_gpu.run(run_command, "answer", *flags, "--output", str(tmp_path / device), "--device", device)
    assert (tmp_path / "cuda").read_bytes() == (tmp_path / "cpu").read_bytes()


def test_an_evaluation_waits_once(one_gpu, run_dir, tiny_corpus):
    (found,) = one_gpu.run(evaluate_waits, str(run_dir), str(tiny_corpus))
    assert [number for place, number in found.items() if " measure_loss" in place] == [1], found


def test_a_token_waits_once(one_gpu, run_dir):
    few, many = (sum(one_gpu.run(generate_waits, str(run_dir), number)[0].values()) for number in (4, 12))
    assert many - few == 8


@pytest.mark.gpu
def test_a_model_goes_out_and_comes_back(one_gpu, run_dir, tmp_path):
    """Exported, continued from Python, by the command and by the server: the same greedy words as on a CPU."""
    folder = tmp_path / "export"
    flags = ["--run-dir", str(run_dir), "--output", str(folder), "--format", "minimind"]
    assert one_gpu.run(run_command, "export", *flags)[0][0] == 0
    save_byte_level(folder)  # the corpus has none
    (said,) = one_gpu.run(use_export, str(folder), "cuda")
    (expected,) = one_gpu.run(use_export, str(folder), "cpu")
    assert said["device"] == "cuda:0" and expected["device"] == "cpu"
    assert said["python"] == expected["python"] != ""
    assert said["python"] in said["command"] and said["python"] == said["server"]


@pytest.mark.parametrize("command", ["doctor", "plan"])
def test_what_is_told_of_a_gpu(one_gpu, command):
    flags = ["--model", "tiny", "--seq-len", "128", "--device", "cuda"] if command == "plan" else []
    ((code, printed),) = one_gpu.run(run_command, command, *flags)
    assert "H100" in printed if command == "doctor" else code == 0


def test_a_start_says_nothing_that_is_not_the_run_s_own(tiny_corpus, tmp_path):
    """DeepSpeed tries none of its ops, of which a machine without the CUDA toolkit cannot build seven."""
    command = ["bash", str(ROOT / "launch" / "pretrain.sh"), *flags_for(tiny_corpus, tmp_path / "run", steps=2)]
    done = subprocess.run(command, env=environment(Machine()), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "triton not found" not in line]
    assert lines[0].startswith("run       ")
    assert not [line for line in lines if "WARNING" in line or "compatib" in line or "\x1b" in line], lines


def test_a_dry_run_says_what_a_gpu_gets(one_gpu, tiny_corpus, tmp_path):
    flags = [
        *flags_for(tiny_corpus, tmp_path / "run", **EXPERTS, ds_config=ROOT / "ds_configs/zero2.json"),
        "--dry-run",
    ]
    ((code, printed),) = one_gpu.run(run_command, "train", *flags)
    lines = {line.partition(" ")[0]: line for line in printed.splitlines()}
    assert code == 0 and "off: Triton (pip install triton) is missing" in lines["compile"]
    said = ("figures every 10 steps", "buckets of 5,000,000, beside the backward", "TF32 off", "host threads a rank")
    assert all(words in lines["gpu"] for words in said), lines["gpu"]
    assert "allocator expandable_segments:True" in lines["gpu"]  # for the experts


def test_tests_are_for_the_cpu_wherever_they_run():
    code = "import conftest, torch; print(torch.cuda.is_available())"
    # As the process that starts the workers sees it, which may be a worker here.
    variables = {name: value for name, value in environment(Machine()).items() if name != "PYTEST_XDIST_WORKER"}
    for more, answer in (([], "False"), (["-m", "gpu"], "True")):
        found = subprocess.run(
            [sys.executable, "-c", code, *more], cwd=ROOT / "tests", env=variables, capture_output=True, text=True
        )
        assert found.stdout.split() == [answer], found.stderr[-1000:]
