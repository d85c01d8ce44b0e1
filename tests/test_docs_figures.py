"""The figures of the documentation, computed again, and the mistakes that it corrects, shown on the code."""

import math
import re
import sys
from random import Random

import pytest
import torch
import torch.nn.functional as F
from activation_formula import layer_activations_per_token
from docs_pages import ARCHITECTURE, GUIDE, LANGUAGES, ROOT, find_sections, flow, read_page

from minimind.config.run_config import TrainConfig
from minimind.data.dataset import TokenDataset
from minimind.data.loader import BatchLoader
from minimind.data.shards import open_split
from minimind.inference.sampling import GenerationOptions, draw
from minimind.model import PRESETS, ModelConfig
from minimind.model.attention_mask import causal_mask
from minimind.model.layers import FeedForward, RMSNorm
from minimind.model.loss import LMHead
from minimind.model.moe import MoEFeedForward
from minimind.model.rope import attention_factor, inverse_frequencies, rotary_tables, rotate
from minimind.model.router import route, router_aux_loss
from minimind.training.lr_schedule import learning_rate

sys.path.insert(0, str(ROOT / "docs"))

import tables


def grouped(number: int) -> str:
    """1234567 -> 1{,}234{,}567, as in formulas."""
    return f"{number:,}".replace(",", "{,}")


def vector(values, digits: int = 3) -> str:
    return "(" + ", ".join(f"{value:.{digits}f}" for value in values) + ")"


def architecture_figures() -> list[str]:
    config, small = PRESETS["minimind3"], PRESETS["minimind2-small"]
    d, heads_kv, size, width = config.hidden_size, 4, config.head_size, config.feed_forward_size
    attention, feed_forward, norms = 2 * d * d + 2 * d * heads_kv * size, 3 * d * width, 2 * d + 2 * size
    layer = attention + feed_forward + norms
    assert 8 * layer + d + 6400 * d == config.num_params()
    figures = [*map(grouped, (6400 * d, attention, feed_forward, norms, layer, config.num_params()))]
    figures += [f"{small.num_params():,}", f"{feed_forward * 8 / config.num_params():.0%}"]
    for x in ([1.0, 2, 3, 4], [11.0, 12, 13, 14]):
        x = torch.tensor(x)
        figures += [vector(F.layer_norm(x, (4,))), vector(F.rms_norm(x, (4,)))]
    rope = ModelConfig(hidden_size=4, num_attention_heads=1, num_key_value_heads=1, rope_theta=100.0)
    turned = rotate(torch.tensor([1.0, 0, 0, 1]).view(1, 1, 1, 4), *rotary_tables(rope, torch.tensor([2])))
    figures.append(vector(turned.flatten().tolist()))
    bf16 = torch.tensor([29952.0, 30080.0, 30001.0]).bfloat16().tolist()
    assert bf16[:2] == [29952, 30080] and bf16[2] == 29952
    figures += ["29,952", "30,080"]
    slowest = {base: 2 * math.pi * base ** (94 / 96) for base in (1e4, 1e6)}
    figures += [f"{round(slowest[1e4], -3):,.0f}"]
    assert round(slowest[1e6] / 1e6, 1) == 4.7
    pair = {turns: 96 * math.log(2048 / (turns * 2 * math.pi)) / (2 * math.log(1e6)) for turns in (32, 1)}
    factor = 0.1 * math.log(4) + 1
    figures += [f"= {pair[32]:.2f}", f"= {pair[1]:.1f}", f"m = {factor:.4f}", f"m^2 = {factor**2:.4f}"]
    figures += [f"{8 * 32768**2 * 2 / 2**30:.0f} GiB", f"{config.num_params() * 2 / 2**20:.0f} MiB"]
    figures += [f"SiLU({x}) = {F.silu(torch.tensor(float(x))).item():.3f}" for x in (2, 1, -1)]
    figures += [f"{768 * math.pi:.1f}", "2432"]
    scores = tables.softmax(tables.SCORES)
    figures += [vector(scores, 4), f"{scores[0] / sum(scores[:2]):.4f}", f"{scores[1] / sum(scores[:2]):.4f}"]
    share, mean = [5 / 8, 1 / 8, 1 / 8, 1 / 8], [0.55, 0.15, 0.15, 0.15]
    figures.append(f"{4 * sum(f * p for f, p in zip(share, mean, strict=True)):.1f}")
    older = PRESETS["minimind2-moe"]
    figures += [rf"\alpha = {older.router_aux_loss_coef}$", f"{older.router_aux_loss_coef * 8:.2f}"]
    figures += [f"{math.comb(64, 4):,}", f"{8192 * 768 * 2 * 3 / 4 / 2**20:.0f} MiB"]
    return figures


def guide_figures() -> list[str]:
    config = PRESETS["minimind3"]
    figures = [f"= {math.log(6400):.2f}", f"{3 / math.log(2) / 4:.3f}", f"{2.6 / math.log(2) / 3:.3f}"]
    train = TrainConfig(steps=1000, lr=5e-4, warmup_steps=20, schedule="cosine", min_lr_ratio=0.1)
    rates = [learning_rate(step, train) for step in (0, 19, 510, 1000)]
    assert rates == pytest.approx([2.5e-5, 5e-4, 2.75e-4, 5e-5])
    figures += [f"{rate:.2e}".replace("0e-0", "e-").replace("e-0", "e-").replace(".0e", "e") for rate in rates]
    figures += [grouped(round(1 / (5e-4 * 0.1))), f"{1 / 5:.1f}"]
    per_layer, tokens = layer_activations_per_token(config), 2 * 2048
    kept = tokens * (8 * config.hidden_size + per_layer) * 2
    figures += [f"{per_layer:,}", f"{tokens * 8 * per_layer * 2 / 2**30:.2f} GiB", f"{kept / 2**20:.0f} MiB"]
    figures.append(f"{config.num_params() * 2 / 2**30:.2f} GiB")
    figures += [f"{(100 * 2 + 300 * 4) / 400:.1f}", f"{1003 // 16} ", f"{config.num_params() * 16 / 1e9:.2f}"]
    figures.append(f"{config.num_params() * 14 / 1e9:.2f} GB")
    assert 1003 - 62 * 16 == 11 and 16 - 11 == 5
    flops = config.flops_per_token(512)
    figures += [f"{flops:,}", f"{flops * 1e5 / 1e12:.1f}", f"{flops * 1e5 / 312e12:.1%}"]
    probabilities = tables.softmax(tables.SCORES)
    cumulated = [sum(probabilities[: i + 1]) for i in range(4)]
    figures += [vector(cumulated, 4), vector([p / cumulated[2] for p in probabilities[:3]], 4)]
    figures.append(vector([p / cumulated[1] for p in probabilities[:2]], 4))
    for dtype in (torch.bfloat16, torch.float16):
        info = torch.finfo(dtype)
        figures += [f"{info.smallest_normal * info.eps:.1e}".replace("e-0", "e-"), f"{1 + info.eps:.7f}"]
    figures += [f"{torch.finfo(torch.float16).max:.0f}", f"{tokens * 32000 * 4 / 2**20:.0f} MiB"]
    return figures


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("page, figures", [(ARCHITECTURE, architecture_figures), (GUIDE, guide_figures)])
def test_worked_figures_follow_from_their_formulas(language, page, figures):
    text = flow(read_page(language, page))
    for figure in figures():
        assert figure in text, f"{language}/{page} should say {figure}"


def test_gradient_of_rmsnorm_is_the_derived_one():
    x = torch.randn(8, dtype=torch.float64, requires_grad=True)
    gain, incoming = torch.randn(2, 8, dtype=torch.float64)
    F.rms_norm(x, (8,), gain, 0.0).backward(incoming)
    r = x.detach().square().mean().sqrt()
    y, v = x.detach() / r, gain * incoming
    assert torch.allclose(x.grad, (v - y * (v * y).mean()) / r)


def test_fp16_rounds_and_its_scale_moves_as_the_guide_says(monkeypatch):
    from deepspeed.runtime.fp16 import loss_scaler  # slow to import

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)
    assert torch.tensor([2.9e-8, 3.1e-8]).half().tolist() == [0.0, pytest.approx(6e-8, rel=0.01)]
    scaler = loss_scaler.DynamicLossScaler(2**16, 1000, 1, delayed_shift=2, consecutive_hysteresis=False)
    for overflow in (True, *[False] * 50, True):
        scaler.update_scale(overflow)
    assert scaler.loss_scale == 2**15
    assert torch.amp.GradScaler(device="cpu").get_growth_interval() == 2000


@pytest.mark.parametrize("language", LANGUAGES)
def test_readme_of_parameter_counts_is_that_of_the_presets(language):
    table = tables.presets(language)
    for name, config in PRESETS.items():
        assert f"| `{name}` |" in table and f"{config.num_params():,}" in table


def test_yarn_table_is_what_the_model_uses():
    config, plain = ModelConfig(rope_scaling_factor=4.0), ModelConfig()
    ratio = inverse_frequencies(config) / inverse_frequencies(plain)
    for pair in range(config.head_size // 2):
        assert ratio[pair].item() == pytest.approx(tables.yarn_row(config, pair)[2])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_memory_follows_the_formulas_of_the_guide(stage):
    memory, params, ranks = tables.estimate("large", stage, 8), PRESETS["large"].num_params(), 8
    if stage == 0:
        expected = (4 * params, 4 * params, 8 * params)
    else:
        weights = 2 * params if stage < 3 else params // ranks * 2
        gradients = 4 * params if stage == 1 else params // ranks * 4
        expected = (weights, gradients, params // ranks * 12)
    assert (memory.parameters, memory.gradients, memory.optimizer) == pytest.approx(expected, rel=1e-6)


# Corrections -------------------------------------------------------------------------------------------------------

# Statements that a reader may have learned otherwise, by page and section; each has a test of its own below.
CORRECTIONS = {
    (ARCHITECTURE, "assembly"),
    (ARCHITECTURE, "rope"),
    (ARCHITECTURE, "yarn"),
    (ARCHITECTURE, "kv-cache"),
    (ARCHITECTURE, "swiglu"),
    (ARCHITECTURE, "load-balancing"),
    (GUIDE, "gradient-accumulation"),
    (GUIDE, "aux-loss"),
    (GUIDE, "top-k-top-p"),
}


@pytest.mark.parametrize("language, word", [("en", "> **Correction.**"), ("zh", "> **更正。**")])
def test_corrections_stand_where_they_should(language, word):
    found = {
        (page, anchor)
        for page in (ARCHITECTURE, GUIDE)
        for anchor, section in find_sections(read_page(language, page)).items()
        if word in section
    }
    assert found == CORRECTIONS


def test_correction_yarn_stretches_slow_pairs_most_and_keeps_fast_ones():
    config = ModelConfig(rope_scaling_factor=4.0)
    stretch = inverse_frequencies(ModelConfig()) / inverse_frequencies(config)
    assert stretch[0] == 1 and stretch[-1] == pytest.approx(4) and (stretch.diff() >= -1e-12).all()
    assert attention_factor(config) == pytest.approx(1.1386, abs=1e-4)


def test_correction_rotation_pairs_the_halves_not_the_neighbours():
    config = ModelConfig(hidden_size=8, num_attention_heads=1, num_key_value_heads=1)
    x = torch.zeros(1, 1, 1, 8)
    x[..., 1] = 1.0
    turned = rotate(x, *rotary_tables(config, torch.tensor([3]))).flatten()
    assert set(turned.nonzero().flatten().tolist()) == {1, 5}


def test_correction_the_activation_stands_on_the_gate():
    torch.manual_seed(0)
    layer, x = FeedForward(PRESETS["tiny"], 32), torch.randn(3, 64)
    gate, up = x @ layer.gate_proj.weight.t(), x @ layer.up_proj.weight.t()
    torch.testing.assert_close(layer(x), (F.silu(gate) * up) @ layer.down_proj.weight.t())
    assert not torch.allclose(layer(x), (gate * F.silu(up)) @ layer.down_proj.weight.t())
    assert not torch.allclose(layer(x), F.silu(gate * up) @ layer.down_proj.weight.t())


@pytest.mark.parametrize("sequence_form", [False, True])
def test_correction_a_balanced_router_costs_alpha_a_layer(sequence_form):
    config = ModelConfig(use_moe=True, num_experts=8, num_experts_per_tok=2, seq_aux=sequence_form)
    uniform = [torch.zeros(2 * 16, 8)] * 3
    assert router_aux_loss(uniform, config, (2, 16)).aux_loss.item() == pytest.approx(3 * config.router_aux_loss_coef)


def test_correction_several_new_tokens_see_a_rectangle():
    mask = causal_mask(3, 2, None, torch.device("cpu")).allowed
    assert mask is not None and mask.int().squeeze().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    for language in LANGUAGES:
        rows = re.findall(
            r"^\S+ \d +((?:[01] ?){5})$", find_sections(read_page(language, ARCHITECTURE))["kv-cache"], re.M
        )
        assert [[int(cell) for cell in row.split()] for row in rows] == mask.int().squeeze().tolist()


def test_correction_accumulated_losses_are_weighted_by_tokens():
    torch.manual_seed(0)
    head, states = LMHead(PRESETS["tiny"]), torch.randn(8, 64)
    labels = torch.tensor([5, -100, -100, -100, 7, 8, 9, 10])
    whole = head(states, labels)
    sums = head(states[:4], labels[:4], "sum") + head(states[4:], labels[4:], "sum")
    assert (sums / 5).item() == pytest.approx(whole.item(), rel=1e-6)
    means = (head(states[:4], labels[:4]) + head(states[4:], labels[4:])) / 2
    assert abs(means.item() - whole.item()) > 1e-4


def test_correction_every_step_is_full_also_where_an_epoch_ends(tiny_corpus):
    dataset = TokenDataset(open_split(tiny_corpus, "train"), 64)
    total, size = len(dataset), 16
    assert total % size, "the epoch should not divide, or this shows nothing"
    loader = BatchLoader(dataset, 0, 4, size)
    taken: list[int] = []
    for step in range(2 * total // size):
        batches = loader.step_batches(step)
        assert sum(len(batch.input_ids) for batch in batches) == size
        taken += [position for batch in batches for position in batch.positions]
    assert taken == list(range(len(taken)))
    indices = loader.order[torch.arange(2 * total).numpy()]
    assert sorted(indices[:total]) == sorted(indices[total:]) == list(range(total))


def draw_tokens(**options) -> set[int]:
    """The tokens that some hundred draws from the worked example's scores give."""
    rows, randoms = [GenerationOptions(**options)] * 600, [Random(seed) for seed in range(600)]
    return set(draw(torch.tensor(tables.SCORES).expand(600, 4), rows, randoms, [[0]] * 600, 4).tolist())


def test_correction_top_p_keeps_the_token_that_crosses_and_comes_after_the_temperature():
    assert draw_tokens(temperature=1.0, top_p=0.9) == {0, 1, 2}
    assert draw_tokens(temperature=0.5, top_p=0.9) == {0, 1}
    assert draw_tokens(temperature=1.0, top_p=None, top_k=2) == {0, 1}


def test_points_to_watch_on_routers_and_norms():
    torch.manual_seed(0)
    one = MoEFeedForward(ModelConfig(hidden_size=64, use_moe=True, num_experts_per_tok=1, initializer_range=0.3))
    one(torch.randn(1, 8, 64)).square().sum().backward()
    largest = max(parameter.grad.abs().max() for parameter in one.experts.parameters() if parameter.grad is not None)
    assert one.gate.weight.grad is not None and one.gate.weight.grad.abs().max() < 1e-5 * largest, "more than rounding"
    weights, chosen = route(torch.tensor([tables.SCORES]), ModelConfig(use_moe=True, num_experts_per_tok=2))
    assert sorted(chosen[0].tolist()) == [0, 1] and max(weights[0]).item() == pytest.approx(0.7311, abs=1e-4)
    norm, x = RMSNorm(4, 1e-12), torch.randn(4)
    torch.testing.assert_close(norm(3 * x), norm(x))
    assert not torch.allclose(norm(x + 10), norm(x), atol=1e-2)
