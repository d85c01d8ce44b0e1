"""What each exercise is tested with: check_N takes the exercise's module and raises `Wrong` where it is not right.

The answers come from minimind/ and torch, not from the solutions.
"""

import contextlib
import math
import tempfile
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F

from minimind.config.run_config import TrainConfig
from minimind.inference.decoding import Row, decode
from minimind.inference.sampling import GenerationOptions
from minimind.model import PRESETS, MiniMindForCausalLM, ModelConfig
from minimind.model.attention import explicit_attention
from minimind.model.attention_mask import AttentionMask
from minimind.model.layers import FeedForward
from minimind.model.rope import inverse_frequencies, rotary_tables, rotate
from minimind.model.router import route, router_aux_loss
from minimind.training.lr_schedule import learning_rate


class Wrong(Exception):
    """An answer is not right; says which and what it should be."""


def same(what: str, found: object, wanted: object) -> None:
    """Raise `Wrong` unless both are equal, numbers and tensors up to rounding."""
    try:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    except (AssertionError, TypeError, ValueError):
        raise Wrong(f"{what} should be {wanted}, found {found}") from None


def equal(what: str, found: object, wanted: object) -> None:
    """Raise `Wrong` unless both are equal, names and numbers of things."""
    if found != wanted:
        raise Wrong(f"{what} should be {wanted}, found {found}")


def random(*shape: int) -> torch.Tensor:
    """The same numbers each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def check_1(module: ModuleType) -> None:
    for name in ("tiny", "minimind3", "large"):
        config = PRESETS[name]
        shape = (config.vocab_size, config.hidden_size, config.num_hidden_layers, config.num_attention_heads)
        found = module.num_params(*shape, config.num_key_value_heads, config.head_size, config.feed_forward_size)
        same(f"the size of {name}", found, config.num_params())


def check_2(module: ModuleType) -> None:
    x, gain, incoming = random(3, 8).requires_grad_(), random(8), random(8, 3).T.contiguous()
    wanted = F.rms_norm(x, (8,), gain, 1e-5)
    wanted.backward(incoming)
    same("the output", module.rms_norm(x.detach(), gain, 1e-5), wanted.detach())
    same("the gradient", module.rms_norm_gradient(x.detach(), gain, 1e-5, incoming), x.grad)


def check_3(module: ModuleType) -> None:
    config = ModelConfig(hidden_size=8, num_attention_heads=1, num_key_value_heads=1, rope_theta=100.0)
    for position in (0, 2, 7):
        wanted = rotate(random(8).view(1, 1, 1, 8), *rotary_tables(config, torch.tensor([position]))).flatten()
        same(f"x at position {position}", module.rotate(random(8), position, 100.0), wanted)


def check_4(module: ModuleType) -> None:
    config = ModelConfig(rope_scaling_factor=4.0)
    found = module.yarn_frequencies(config.head_size, config.rope_theta, config.trained_length, 4.0)
    same("the frequencies", [f * 1e4 for f in found], [f * 1e4 for f in inverse_frequencies(config).tolist()])


def check_5(module: ModuleType) -> None:
    vectors = random(4, 5, 8), random(2, 5, 8), random(5, 2, 8).transpose(0, 1)
    wanted = explicit_attention(*(heads[None] for heads in vectors), AttentionMask(), 0.0)[0]
    same("the output", module.attention(*vectors), wanted)


def check_6(module: ModuleType) -> None:
    torch.manual_seed(0)
    model = MiniMindForCausalLM(ModelConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2)).eval()
    lengths: list[int] = []
    model.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].shape[1]))
    found = module.continue_greedily(model, [3, 1, 4], 5)
    same("the tokens read by each forward", lengths, [3, 1, 1, 1, 1])
    row = Row([3, 1, 4], GenerationOptions(max_new_tokens=5, temperature=0))
    for _ in decode(model, [row]):
        pass
    same("the tokens", found, row.new_tokens)


def check_7(module: ModuleType) -> None:
    scores, values = random(12) * 20, random(12, 4)
    found = module.attend_in_blocks(list(scores.split(5)), list(values.split(5)))
    same("the output", found, scores.softmax(0) @ values)


def check_8(module: ModuleType) -> None:
    layer = FeedForward(ModelConfig(hidden_size=16), 24)
    gate, up = (random(3, 24) * factor for factor in (1, 2))
    inputs = [[tensor.clone().requires_grad_() for tensor in (gate, up)] for _ in range(2)]
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = module.SwiGLU.apply(*inputs[0])
    wanted = F.silu(inputs[1][0]) * inputs[1][1]
    same("the output", found.detach(), wanted.detach())
    (found.sum() + wanted.sum()).backward()
    for name, mine, theirs in zip(("gate", "up"), *inputs, strict=True):
        same(f"the gradient by {name}", mine.grad, theirs.grad)
    same("how many tensors are kept", len(kept), 2)
    mine = layer.down_proj(module.SwiGLU.apply(layer.gate_proj(x := random(3, 16)), layer.up_proj(x)))
    same("a layer's output with your kernel", mine.detach(), layer(x).detach())


def check_9(module: ModuleType) -> None:
    wanted = route(random(6, 4), ModelConfig(use_moe=True, num_experts=4, num_experts_per_tok=2))
    for what, *both in zip(("the weights", "the experts"), module.route(random(6, 4), 2), wanted, strict=True):
        same(what, *both)


def check_10(module: ModuleType) -> None:
    config = ModelConfig(use_moe=True, num_experts=4, num_experts_per_tok=2, router_aux_loss_coef=1.0)
    mine, theirs = (random(6, 4).requires_grad_() for _ in range(2))
    found, wanted = module.balance_loss(mine, 2), router_aux_loss([theirs], config, (1, 6)).aux_loss
    same("the loss", found.detach(), wanted.detach())
    gradients = [torch.autograd.grad(loss, logits)[0] for loss, logits in ((found, mine), (wanted, theirs))]
    same("its gradient", *gradients)


def check_11(module: ModuleType) -> None:
    def run(matrices: tuple[torch.Tensor, ...]) -> torch.Tensor:
        gate, up, down = matrices
        return down @ (F.silu(gate @ x) * (up @ x))

    x, inner = random(8), (5, 7)
    first, second = ((random(i, 8), random(i, 8) * 2, random(8, i)) for i in inner)
    same("the sum", run(module.join(first, second)), run(first) + run(second))


def check_12(module: ModuleType) -> None:
    calls: list[int] = []
    matrices = random(4, 8, 8)

    def expert(number: int) -> object:
        return lambda rows: (calls.append(number), rows @ matrices[number])[1]

    tokens, chosen = random(6, 8), torch.tensor([[0, 2], [1, 2], [0, 1], [2, 0], [2, 1], [0, 2]])
    found = module.run_experts(tokens, chosen, [expert(number) for number in range(4)])
    same("the outputs", found, torch.einsum("nd,nkde->nke", tokens, matrices[chosen]))
    same("who was called", sorted(calls), [0, 1, 2, 3])


def check_13(module: ModuleType) -> None:
    equal("the table", module.rows_to_send([[0, 2, 1, 3], [2, 0, 3, 3]], 4), [[2, 2], [1, 3]])
    wanted = [[0, 0, 0, 1], [2, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0]]
    equal("the table of four ranks", module.rows_to_send([[7], [0, 1], [4, 5], []], 8), wanted)


def check_14(module: ModuleType) -> None:
    found = module.learn_merges(["the", "cat", "sat", "the", "rat", "sat", "the", "hat", "that"], 3)
    equal("the merges", found, [("a", "t"), ("t", "h"), ("th", "e")])
    equal("a merge of a run", module.learn_merges(["aaaab"], 1), [("a", "a")])


def check_15(module: ModuleType) -> None:
    same("window 1 of 4", module.window(list(range(10, 21)), 1, 4), ([14, 15, 16, 17], [15, 16, 17, 18]))
    same("the last, short one", module.window(list(range(10, 21)), 2, 4), ([18, 19, 0, 0], [19, 20, -100, -100]))


def check_16(module: ModuleType) -> None:
    wanted = ([0, 1, 2, 3, 0, 1, 2, 3, 4, 0], [0, 4, 9, 10])
    same("the window of the guide", module.positions_and_borders([5, 6, 7, 0, 5, 6, 7, 8, 0, 9], 0), wanted)
    same("a document that fills the window", module.positions_and_borders([5, 0], 0), ([0, 1], [0, 2]))


def check_17(module: ModuleType) -> None:
    for rank in range(3):
        turns = [[start, start + 1] for start in (12 + rank * 2, 18 + rank * 2)]
        same(f"step 1 of rank {rank}", module.windows_of_a_rank(1, rank, 3, 2, 2), turns)
    everything = [place for rank in range(4) for turn in module.windows_of_a_rank(2, rank, 4, 3, 2) for place in turn]
    same("all ranks together", sorted(everything), list(range(48, 72)))


def check_18(module: ModuleType) -> None:
    theirs = torch.nn.Parameter(random(4))
    mine, m, v = random(4), torch.zeros(4), torch.zeros(4)
    optimizer = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for t in (1, 2, 3):
        theirs.grad = random(t, 4)[-1]
        optimizer.step()
        module.adamw_step(mine, theirs.grad.clone(), m, v, t, 0.1, 0.1)
        same(f"the weight after step {t}", mine, theirs.detach())


def check_19(module: ModuleType) -> None:
    found = torch.linalg.svdvals(answer := module.orthogonalize(random(6, 10)))
    if not (found.min() > 0.6 and found.max() < 1.3):
        raise Wrong(f"the singular values should lie near 1, found {found.tolist()}")
    kept = answer @ random(6, 10).T
    same("the result's product with the matrix, which is symmetric,", kept, kept.T)


def check_20(module: ModuleType) -> None:
    train = TrainConfig(steps=100, lr=1e-1, warmup_steps=10, schedule="wsd", min_lr_ratio=0.1, decay_ratio=0.2)
    for step in (0, 5, 9, 10, 79, 80, 90, 99):
        same(f"the rate of step {step}", module.wsd(step, 100, 1e-1, 10, 20, 0.1), learning_rate(step, train))


def check_21(module: ModuleType) -> None:
    for factor in (1.0, 0.01):
        gradients = [random(3) * factor, random(2, 2) * factor]
        parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        norms = float(module.clip(gradients, 0.5)), torch.nn.utils.clip_grad_norm_(parameters, 0.5).item()
        same("the norm before", *norms)
        same("the gradients", gradients, [parameter.grad for parameter in parameters])


def check_22(module: ModuleType) -> None:
    scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    scaler.scale(torch.ones(()))  # it makes its scale at its first use
    mine = (scaler.get_scale(), 0)
    for overflow in (False, False, True, False, False, False, False, True, True):
        mine = module.move_scale(*mine, overflow, 3)
        torch._amp_update_scale_(scaler._scale, scaler._growth_tracker, torch.tensor(float(overflow)), 2.0, 0.5, 3)
        same("the scale and the good steps", mine, (scaler.get_scale(), scaler._get_growth_tracker()))


def check_23(module: ModuleType) -> None:
    same("the example of the guide", module.step_loss([2.0, 4.0], [100, 300]), 3.5)
    same("with an empty micro-batch", module.step_loss([0.0, 2.0], [0, 7]), 2.0)


def check_24(module: ModuleType) -> None:
    for stage, wanted in ((1, 2 + 4 + 12 / 8), (2, 2 + 16 / 8), (3, 18 / 8)):
        same(f"stage {stage} on 8 ranks", float(module.zero_bytes(1_000_000, 8, stage)), wanted * 1e6)


def check_25(module: ModuleType) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, files = Path(name) / "step_1", {"a": b"alpha", "b": b"beta"}
        module.save(folder, files)
        there = sorted(path.name for path in Path(name).rglob("*"))
        equal("what lies there", there, ["a", "b", "manifest.json", "step_1"])
        equal("what is damaged", module.damaged(folder), [])
        (folder / "a").write_bytes(b"alpho")
        (folder / "b").unlink()
        equal("what is damaged after a changed and a lost file", sorted(module.damaged(folder)), ["a", "b"])
        with contextlib.suppress(TypeError):
            module.save(Path(name) / "step_2", {"a": b"1", "b": 2})  # it cannot write this: the folder must not appear
        equal("whether half a checkpoint is there", (Path(name) / "step_2").exists(), False)


def check_26(module: ModuleType) -> None:
    for factor in (1.0, 1000.0):
        logits, targets = (random(5, 7) * factor).requires_grad_(), torch.tensor([0, 6, 3, 3, 1])
        wanted = F.cross_entropy(logits, targets, reduction="sum")
        wanted.backward()
        loss, gradient = module.cross_entropy(logits.detach(), targets)
        same("the loss", loss, wanted.detach())
        same("the gradient", gradient, logits.grad)


def check_27(module: ModuleType) -> None:
    for text in ("the cats", "猫在睡"):
        same(f"{text}, 2 tokens", module.bits_per_byte(3.0, 2, text), 2 * 3 / math.log(2) / len(text.encode()))


def check_28(module: ModuleType) -> None:
    probs = torch.tensor([0.2, 0.5, 0.05, 0.25])
    for p, kept in ((0.9, [1, 1, 0, 1]), (0.5, [0, 1, 0, 0]), (1.0, [1, 1, 1, 1]), (0.01, [0, 1, 0, 0])):
        wanted = probs * torch.tensor(kept) / (probs * torch.tensor(kept)).sum()
        same(f"what top-p {p} leaves of {probs.tolist()}", module.top_p(probs.clone(), p), wanted)


def check_29(module: ModuleType) -> None:
    config = PRESETS["minimind3"]
    matrices = config.num_params() - (2 * config.hidden_size + 2 * config.head_size) * 8 - config.hidden_size
    found = module.mfu(1e5, matrices, 8, config.hidden_size, 512, 312e12)
    same("the MFU of the guide", found, config.flops_per_token(512) * 1e5 / 312e12)


def check_30(module: ModuleType) -> None:
    from minimind.training.objectives.preference import dpo_loss, pair_up  # slow to import

    reference = random(4, 2).flatten() - 5
    answers = pair_up(random(8) - 5, torch.ones(8), reference)
    found = module.dpo_loss(answers.chosen, answers.rejected, reference[0::2], reference[1::2], 0.1)
    same("the losses", found, dpo_loss(answers, TrainConfig(beta=0.1)))


CHECKS = {int(name.removeprefix("check_")): f for name, f in list(globals().items()) if name.startswith("check_")}
