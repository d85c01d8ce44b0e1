"""The same small matrix on a device of each make, by the name that torch has for it: a CPU's losses, a resume to the
bit, a CPU's words; and what a make cannot do is gone around and said."""

import dataclasses

import pytest
from matrix_runs import KINDS, TOLERANCE, cpu_reference, matrix_flags, run
from simulated_device import PROFILES, Machine
from simulated_ranks import simulated_ranks
from simulated_runs import compute, resume, run_command, train_with_memory
from tokenizers_for_tests import save_byte_level
from training_runs import losses, train

from minimind.data.tokenizer import load_tokenizer
from minimind.model import PRESETS, MiniMindForCausalLM

MAKES = {PROFILES[kind].type: kind for kind in ("H100", "M3", "Max1550", "910B")}


@pytest.fixture(scope="module", params=MAKES)
def make(request):
    """The name of a device, and a rank on it."""
    for ranks in simulated_ranks(1, Machine(MAKES[request.param])):
        yield request.param, ranks


@pytest.fixture(scope="module")
def reference(tiny_corpus, tmp_path_factory):
    yield from cpu_reference(tiny_corpus, tmp_path_factory.mktemp)


def test_torch_and_deepspeed_know_the_device(make):
    name, ranks = make
    (found,) = ranks.run(compute)
    assert found["accelerator"] == found["deepspeed"] == found["loss device"] == name
    assert found["loss"] == pytest.approx(found["loss of a cpu"], rel=1e-6)
    assert found["held"] > 0
    apple = {"float64": "TypeError", "pinned memory": "RuntimeError", "a second stream": "ZeroDivisionError"}
    assert found["lacks"] == (apple if name == "mps" else {})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", TOLERANCE)
def test_a_run_has_the_losses_of_a_cpu(make, tiny_corpus, tmp_path, reference, kind, precision):
    name, ranks = make
    printed, found = run(ranks, tiny_corpus, tmp_path, "zero1", kind, precision)
    assert f" x {name}, {precision}" in printed
    assert found == pytest.approx(reference("zero1", kind, precision), rel=TOLERANCE[precision])
    said = printed.partition("step ")[0]
    assert ("no variable-length attention here" in said) == (kind == "documents" and name != "cuda")
    assert ("are multiplied one after another" in said) == (kind == "experts" and (name, precision) != ("cuda", "bf16"))


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_a_resume_is_the_same_to_the_bit(make, tiny_corpus, tmp_path, kind):
    _, ranks = make
    flags = matrix_flags(tiny_corpus, tmp_path, "zero2", kind, "bf16", steps=4, save_every=2)
    ranks.run(train, flags)
    whole = losses(tmp_path)
    (code, printed), *_ = ranks.run(resume, flags, tmp_path, 2)
    assert code == 0 and "resumed from" in printed and losses(tmp_path) == whole


def test_the_words_are_those_of_a_cpu(make, tmp_path):
    _, ranks = make
    tokenizer = load_tokenizer(save_byte_level(tmp_path))
    config = dataclasses.replace(PRESETS["tiny"], vocab_size=tokenizer.vocab_size, initializer_range=0.3)
    MiniMindForCausalLM(config).save_pretrained(tmp_path)
    flags = ["--checkpoint", str(tmp_path), "--prompt", "a", "--precision", "fp32", "--temperature", "0"]
    flags += ["--max-new-tokens", "8"]
    ((code, said),) = ranks.run(run_command, "generate", *flags)
    assert (code, said) == ranks.run(run_command, "generate", *flags, "--device", "cpu")[0] and code == 0


def test_memory_that_ends_is_one_line(make, tiny_corpus, tmp_path):
    name, ranks = make
    flags = matrix_flags(tiny_corpus, tmp_path, "zero1", "dense", "fp32")
    ((code, said),) = ranks.run(train_with_memory, 2**18, flags, MAKES[name])
    assert code == 1 and said.startswith(f"{name}:0 is out of memory ") and "\n" not in said
