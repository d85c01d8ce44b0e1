"""What is compiled in training, and that it changes no loss: every ZeRO stage, recomputation, documents, experts."""

import functools
import shutil
import unittest.mock
from types import SimpleNamespace

import pytest
import torch
from training_runs import EXPERTS, RankPool, flags_for, losses, rank_pool, train

from minimind.errors import UserError
from minimind.model import PRESETS, MiniMindForCausalLM, ModelConfig
from minimind.model.attention_mask import AttentionMask
from minimind.model.kernels.compiled import Compiler, fused_chunk_loss
from minimind.model.loss import LMHead
from minimind.model.rope import rotary_tables
from minimind.parallel.compilation import check_expert_kernels, settle_compilation

# What a run compiles, as it says so; the graphs that this takes; and where one ends within a module.
DENSE = (["3 blocks", "the loss"], 2, 0)
CASES = {
    "stage 0": ({"stage": 0}, *DENSE),
    "stage 3": ({"stage": 3}, *DENSE),
    "stage 3, recomputed": ({"stage": 3, "activation_checkpointing": True}, *DENSE),
    # On a CPU the documents' lengths decide the shapes.
    "documents": ({"document_mask": True}, ["3 blocks", "the loss"], 5, 3),
    "experts": (EXPERTS, ["2 shared experts", "2 blocks", "the loss"], 4, 1),
    "experts, stage 3": ({**EXPERTS, "stage": 3}, ["2 attention layers", "2 shared experts", "the loss"], 3, 0),
}


@pytest.fixture(scope="module")
def rank():
    yield from rank_pool(1)


def train_counting(flags: list[str], backend: str) -> tuple[list[str], int, int]:
    """Train with nothing compiled before: what was compiled, in how many graphs, with how many breaks."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    with unittest.mock.patch("torch.compile", functools.partial(torch.compile, backend=backend)):
        code, printed = train(flags)
    assert code == 0, printed
    said = [line.removeprefix("compiled ") for line in printed.splitlines() if line.startswith("compiled ")]
    names = [line.partition(" in ")[0].removesuffix(", one for all,") for line in said]
    return names, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.mark.parametrize("case", CASES)
def test_layers_compile_once_and_losses_stay(rank: RankPool, tiny_corpus, tmp_path, case):
    settings, *expected = CASES[case]
    settings = {"steps": 3, "save_every": 0, "global_batch_size": 2, "num_hidden_layers": 3, **settings}
    rank.run(train, flags_for(tiny_corpus, tmp_path / "plain", **settings, compile="off"))
    given = flags_for(tiny_corpus, tmp_path / "compiled", **settings, compile="on")
    ((names, graphs, breaks),) = rank.run(train_counting, given, "aot_eager")
    assert [names, graphs, breaks] == expected
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_by_torchs_own_compiler_losses_stay(rank: RankPool, tiny_corpus, tmp_path):
    settings = {"steps": 3, "save_every": 0, "global_batch_size": 2, "num_hidden_layers": 2, "stage": 1}
    rank.run(train, flags_for(tiny_corpus, tmp_path / "plain", **settings, compile="off"))
    given = flags_for(tiny_corpus, tmp_path / "compiled", **settings, compile="on")
    assert rank.run(train_counting, given, "inductor") == [(["2 blocks", "the loss"], 2, 0)]
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def test_without_a_compiler_auto_goes_on_and_on_ends(monkeypatch):
    assert settle_compilation("off", "cuda") == (False, "off")
    assert settle_compilation("auto", "cpu") == (False, "off, as by default on a CPU")
    assert settle_compilation("auto", "mps") == (False, "off, as by default on mps")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"compile: on, and a C\+\+ compiler .* is missing; install it"):
        settle_compilation("on", "cpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert settle_compilation("auto", "cuda") == (False, "off: Triton (pip install triton) is missing")
    with pytest.raises(UserError, match="compile: on, and Triton"):
        settle_compilation("on", "cuda")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert settle_compilation("auto", "cuda") == (False, "off: a C compiler (gcc) is missing")
    # AutoEP's experts compute with Triton wherever it is.
    run = SimpleNamespace(train=SimpleNamespace(moe_backend="autoep"))
    check_expert_kernels(run, "cuda")
    monkeypatch.setattr("minimind.parallel.compilation.is_triton_available", lambda: True)
    check_expert_kernels(run, "cpu")
    check_expert_kernels(SimpleNamespace(train=SimpleNamespace(moe_backend=None)), "cuda")
    with pytest.raises(UserError, match=r"autoep compiles kernels, and a C compiler .* is missing"):
        check_expert_kernels(run, "cuda")


def test_what_cannot_be_compiled_is_said_and_runs(monkeypatch):
    def fail(*_):
        raise RuntimeError("no such processor")

    said: list[str] = []
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend=fail))
    double = Compiler(said.append, required=False).compile("a double", lambda x: x + x, lambda x: 2 * x)
    assert double(torch.ones(1)) == double(torch.ones(1)) == 2
    assert len(said) == 1 and said[0].startswith("not compiled: a double: ") and "no such processor" in said[0]
    double = Compiler(said.append, required=True).compile("a double", lambda x: x + x, lambda x: 2 * x)
    with pytest.raises(UserError, match="--compile on: a double: "):
        double(torch.ones(1))


def test_an_error_of_what_is_compiled_stays_what_it_is(monkeypatch):
    def run_full(*_):
        def run(*_):
            raise torch.OutOfMemoryError("full")

        return run

    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend=run_full))
    double = Compiler(print, required=False).compile("a double", lambda x: x + x, lambda x: 2 * x)
    with pytest.raises(torch.OutOfMemoryError):
        double(torch.ones(1))


@pytest.mark.parametrize("z_loss_coef", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_the_loss_that_fuses_is_the_loss(dtype, tolerance, z_loss_coef):
    logits = (5 * torch.randn(40, 33, generator=torch.Generator().manual_seed(0))).to(dtype)
    targets = torch.arange(40) % 33
    targets[::7] = -100
    loss, grad = fused_chunk_loss(logits, targets, targets != -100, z_loss_coef, True)
    expected_loss, expected_grad = LMHead(ModelConfig()).chunk_loss(logits, targets, targets != -100, z_loss_coef, True)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=tolerance, atol=tolerance)
    assert not grad[::7].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_the_weights_nothing_but_themselves_is_kept_for_the_backward(dtype):
    """A view of a weight that ZeRO-3 has gathered would keep the whole until then."""
    torch._dynamo.reset()
    config = PRESETS["tiny"]
    block = MiniMindForCausalLM(config).to(dtype).model.layers[0]
    weights = {one.untyped_storage().data_ptr(): one for one in block.parameters()}
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(tensor):
        weight = weights.get(tensor.untyped_storage().data_ptr())
        kept.extend([] if weight is None else [(tensor, weight)])
        return tensor

    x = torch.randn(2, 8, config.hidden_size, dtype=dtype, requires_grad=True)
    # torch's own partition of forward and backward, and no kernels.
    forward = torch.compile(type(block).forward, backend="aot_eager_decomp_partition")
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward(block, x, rotary_tables(config, torch.arange(8)), AttentionMask())
    assert len(kept) >= 7 and all(tensor is weight for tensor, weight in kept)
