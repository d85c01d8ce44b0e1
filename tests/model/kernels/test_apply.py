"""Every kernel against the plain module that it replaces, and how they are chosen."""

import copy
import dataclasses
import functools
import shutil

import pytest
import torch
from pytest import approx
from torch import nn
from torch.utils.checkpoint import checkpoint

from minimind.errors import UserError
from minimind.model import PRESETS, MiniMindForCausalLM
from minimind.model.attention import Attention
from minimind.model.attention_mask import AttentionMask, causal_mask
from minimind.model.kernels import matmul
from minimind.model.kernels.apply import KERNELS, NAMES, VARIABLE, apply_kernels
from minimind.model.kernels.experts import GroupedExperts
from minimind.model.layers import FeedForward, Linear, RMSNorm
from minimind.model.lora import LoRALinear, add_adapters
from minimind.model.loss import LMHead
from minimind.model.moe import Experts
from minimind.model.rope import rotary_tables
from minimind.model.transformer import MiniMindModel
from minimind.model.tuning import LoRA

# Wide enough that 20 tokens are worth a call of oneDNN.
CONFIG = dataclasses.replace(PRESETS["tiny"], hidden_size=256, vocab_size=300, num_hidden_layers=1, z_loss_coef=0.01)
EXPERTS = dataclasses.replace(CONFIG, use_moe=True, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=104)
SHAPES = [(2, 37), (1, 1), (3, 8)]
BORDERS = {(2, 37): [0, 5, 6, 37, 60, 74], (1, 1): [0, 1], (3, 8): [0, 8, 9, 16, 24]}


def make_case(plain, shape):
    """A plain module, the differentiable inputs of a call, and the call."""
    tokens, states = torch.randint(0, 300, shape), torch.randn(*shape, CONFIG.hidden_size)
    if plain is Linear:
        return Linear(256, 72, 0.1, bias=shape[0] == 2), states, lambda module, x: module(x)
    if plain is LoRALinear:
        model = MiniMindForCausalLM(dataclasses.replace(CONFIG, attention_bias=shape[0] == 2))
        add_adapters(model, LoRA(rank=8, alpha=16.0))
        query = model.model.layers[0].self_attn.q_proj
        nn.init.normal_(query.lora_B)
        return query, states, lambda module, x: module(x)
    if plain is LMHead:
        labels = tokens.masked_fill(torch.rand(shape) < 0.3, -100)
        labels[0, 0] = 7
        return LMHead(CONFIG), states, lambda module, x: module(x, labels)
    if plain is RMSNorm:
        return RMSNorm(256, 1e-6), torch.cat([states] * 20), lambda module, x: module(x)
    if plain is FeedForward:
        return FeedForward(CONFIG, 136), states, lambda module, x: module(x)
    if plain is Attention:
        rotary = rotary_tables(CONFIG, torch.arange(shape[1]))
        return Attention(CONFIG, 0), states, lambda module, x: module(x, rotary, AttentionMask())
    if plain is MiniMindModel:
        borders = torch.tensor(BORDERS[shape], dtype=torch.int32)
        return (
            MiniMindModel(CONFIG),
            torch.zeros(1, requires_grad=True),
            lambda module, _: module(tokens, None, borders),
        )
    if plain is Experts:
        chosen = torch.rand(*shape, 4).flatten(0, 1).argsort(dim=-1)[:, :2] + (torch.rand(1) > 0.5)  # one idle
        return Experts(EXPERTS), states, lambda module, x: module(x.flatten(0, 1), chosen)
    raise AssertionError(f"no case for {plain}")


def exchange(module, kernel):
    """A copy of the module with the kernel, and with the others of its name inside."""
    fast = copy.deepcopy(module)
    for part in fast.modules():
        for each in (kernel, *KERNELS):
            if each.name == kernel.name and type(part) is each.plain:
                part.__class__ = each.fast
    assert type(fast) is kernel.fast and issubclass(kernel.fast, kernel.plain)
    return fast


def learn(module, x, run):
    """The value and the gradients of the input and every parameter."""
    x = x.detach().requires_grad_()
    found = run(module, x)
    probe = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found.dtype)
    inputs = [x, *module.parameters()]
    return [found.detach(), *torch.autograd.grad(found, inputs, probe, allow_unused=True, materialize_grads=True)]


def off_by(found, exact, least=1e-9):
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm().clamp(min=least))


@pytest.fixture(params=["this processor", "no 16-bit products", "oneDNN in float32"])
def processor(request, monkeypatch):
    if request.param == "no 16-bit products":
        monkeypatch.setattr(matmul, "has_fast_matmul", lambda dtype: False)
    if request.param == "oneDNN in float32":
        if not matmul.has_onednn():
            pytest.skip("this torch has no oneDNN")
        monkeypatch.setattr(matmul, "is_onednn_faster", lambda: True)
    return request.param


@pytest.mark.parametrize("mode", ["", "checkpointed", "compiled", "autocast"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.fast.__name__)
def test_every_kernel_gives_the_plain_values_and_gradients(kernel, mode, processor):
    if mode == "compiled" and kernel.plain is Attention and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    for shape in SHAPES[2 if mode == "compiled" else 0 :]:
        torch.manual_seed(0)
        plain, x, call = make_case(kernel.plain, shape)
        run, exact = call, learn(plain, x, call)
        if mode == "checkpointed":
            run = functools.partial(checkpoint, call, use_reentrant=False)
        elif mode == "compiled":
            torch._dynamo.reset()
            # aot_eager takes the strides of a 16-bit product on a CPU to be others than they are.
            run = torch.compile(call, backend="inductor" if kernel.plain is Attention else "aot_eager")
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            found, near = learn(exchange(plain, kernel), x, run), learn(plain, x, call)
        compare(found, near, exact, 2e-3 if mode == "autocast" else 1e-5)
        if mode != "autocast":
            plain, x = plain.bfloat16(), x.bfloat16()
            exact = learn(copy.deepcopy(plain).float(), x.float(), call)
            compare(learn(exchange(plain, kernel), x, run), learn(plain, x, call), exact, 2e-3)


def compare(found, plain, exact, rounding):
    """A kernel is no further from the exact values than the plain module, or than their rounding."""
    least = 1e-2 * max(wanted.norm() for wanted in exact)  # a gradient of rounding errors alone is not compared
    for ours, theirs, wanted in zip(found, plain, exact, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert off_by(ours, wanted, least) < max(1.5 * off_by(theirs, wanted, least), rounding)


def test_rows_of_a_grouped_product_that_are_not_aligned_are_computed_plainly():
    torch.manual_seed(0)
    plain, x, call = make_case(Experts, (2, 37))
    odd = Experts(dataclasses.replace(EXPERTS, moe_intermediate_size=103))
    kernel = next(kernel for kernel in KERNELS if kernel.fast is GroupedExperts)
    for module, dtype in ((odd, torch.float32), (plain.double(), torch.float64)):
        found, wanted = learn(exchange(module, kernel), x.to(dtype), call), learn(module, x.to(dtype), call)
        assert all(off_by(*both) < 1e-6 for both in zip(found, wanted, strict=True))


def train(config, documents=False, **environment):
    """Losses of 20 steps of AdamW."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(config)
    apply_kernels(model, "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(20):
        tokens = torch.randint(0, 300, (2, 33), generator=torch.Generator().manual_seed(step % 3))
        borders = torch.tensor([0, 7, 32, 50, 64], dtype=torch.int32) if documents else None
        output = model(tokens[:, :-1], tokens[:, 1:], cu_seqlens=borders)
        loss = output.loss if output.aux_loss is None else output.loss + output.aux_loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("config", [CONFIG, EXPERTS], ids=["dense", "experts"])
def test_a_model_trains_alike_with_all_kernels_and_with_none(config, documents, processor, monkeypatch):
    fast = train(config, documents)
    monkeypatch.setenv(VARIABLE, "plain")
    plain = train(config, documents)
    assert fast == approx(plain, rel=1e-5) and fast[-1] < fast[0] - 1


def kinds(model):
    return {type(module) for module in model.modules()}


def test_the_environment_chooses(monkeypatch, processor):
    def applied(value):
        monkeypatch.setenv(VARIABLE, value)
        model = MiniMindForCausalLM(EXPERTS)
        apply_kernels(model, "cpu")
        return {kernel.name for kernel in KERNELS if kernel.fast in kinds(model)}

    every = {"loss", "norm", "attention", "experts", *(["matmul"] if processor != "this processor" else [])}
    assert applied("") - {"matmul"} == applied("all") - {"matmul"} == every - {"matmul"} and every <= applied("all")
    assert applied("plain") == set()
    assert applied("-norm, -experts") == applied("all") - {"norm", "experts"}
    assert applied("norm,attention") == {"norm", "attention"}
    for wrong in ("fast", "norm,-loss", "-", "norms", "plain,norm"):
        with pytest.raises(UserError, match=r"MINIMIND_KERNELS=.*" + ", ".join(NAMES)):
            applied(wrong)


def test_parameters_hooks_and_kinds_stay(monkeypatch):
    model = MiniMindForCausalLM(dataclasses.replace(EXPERTS, first_k_dense_replace=1, num_hidden_layers=2))
    before, parameters, heard = kinds(model), list(model.parameters()), []
    model.model.norm.register_forward_hook(lambda *_: heard.append("norm"))
    outer = torch.nn.Sequential(model)
    apply_kernels(outer, "cpu")
    once = [type(module) for module in outer.modules()]
    apply_kernels(outer, torch.device("cpu"))
    assert [type(module) for module in outer.modules()] == once and set(once) != before
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), parameters, strict=True))
    assert isinstance(model.model.layers[0].mlp, FeedForward) and isinstance(model.model.layers[0].self_attn, Attention)
    model(torch.zeros(1, 4, dtype=torch.long))
    assert heard == ["norm"]
    monkeypatch.setenv(VARIABLE, "plain")
    apply_kernels(outer, "cpu")
    assert kinds(model) == before


def test_a_layer_that_somebody_has_replaced_is_called_as_any_other():
    """A library may put a layer of its own in place of a projection; its input is all that it is given."""

    class Adapted(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.low = base, torch.nn.Linear(base.in_features, base.out_features)

        def forward(self, x):
            return self.base(x) + self.low(x)

    torch.manual_seed(0)
    plain = FeedForward(CONFIG, 136)
    plain.down_proj = Adapted(plain.down_proj)
    fast, x = copy.deepcopy(plain), torch.randn(2, 9, 256)
    apply_kernels(fast, "cpu")
    for left, right in zip(*(learn(each, x, lambda module, x: module(x)) for each in (fast, plain)), strict=True):
        assert off_by(left, right) < 1e-5


def kept_bytes(module, x):
    """What autograd keeps of a forward besides parameters, each storage once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert module(x).requires_grad
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    return sum(size for place, size in kept.items() if place not in parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_and_swiglu_keep_little_for_the_backward_pass(dtype):
    x = torch.randn(50, 256, dtype=dtype, requires_grad=True)
    norm, feed_forward = RMSNorm(256, 1e-6).to(dtype), FeedForward(CONFIG, 160).to(dtype)
    apply_kernels(torch.nn.ModuleList([norm, feed_forward]), "cpu")
    assert kept_bytes(norm, x) == x.nbytes + 4 * 50  # its input, and a float32 number a row
    assert kept_bytes(feed_forward, x) == x.nbytes + 3 * 50 * 160 * x.itemsize  # gate, up and their product


@pytest.mark.parametrize("length", [64, 2000])
def test_masks_and_long_rows_are_left_to_torch(length):
    """In bfloat16, where short causal rows are computed by matrix products."""
    torch.manual_seed(0)
    plain = Attention(dataclasses.replace(CONFIG, num_attention_heads=2, num_key_value_heads=1), 0).bfloat16()
    fast, x = copy.deepcopy(plain), torch.randn(1, length, 256).bfloat16()
    apply_kernels(fast, "cpu")
    rotary = rotary_tables(plain.q_norm and dataclasses.replace(CONFIG, num_attention_heads=2), torch.arange(length))
    padded = torch.ones(1, length, dtype=torch.long)
    padded[:, :3] = 0
    for mask in (AttentionMask(), causal_mask(length, 0, padded, x.device)):
        assert off_by(fast(x, rotary, mask), plain(x, rotary, mask)) < 1e-2
