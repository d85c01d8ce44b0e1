"""The pictures of the architecture page, from the model's own functions. Each gives a figure in one language."""

import math
from dataclasses import replace

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from paper import BLUE, GREEN, GREY, ORANGE, PALE, RANKS, RED, Words, arrow, box, grid, line, plt, sheet, write
from tables import cache_bytes_per_token
from torch.nn import functional as F

from minimind.model import PRESETS, ModelConfig
from minimind.model.attention_mask import causal_mask, document_mask
from minimind.model.rope import inverse_frequencies
from minimind.model.router import route, step_bias

CONFIG = PRESETS["minimind3"]


def millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"


def whole_model(say: Words) -> Figure:
    """minimind3 from token ids to logits, with shapes and parameters."""
    d, kv = CONFIG.hidden_size, CONFIG.num_key_value_heads * CONFIG.head_size
    figure, axes = sheet(7.2, 6.4)
    attention, feed_forward = 2 * d * d + 2 * d * kv, 3 * d * CONFIG.feed_forward_size
    box(axes, 12, 59, 26, 3.6, "input_ids  (B, T)", color=GREY)
    box(axes, 12, 52, 26, 4.4, "embed_tokens", f"{CONFIG.vocab_size} x {d}", color=BLUE)
    axes.add_patch(plt.Rectangle((4, 16.6), 42, 32.6, fc="none", ec="#444444", ls="--", lw=1))
    write(
        axes, 44.8, 47.6, say(f"{CONFIG.num_hidden_layers} x Block", f"{CONFIG.num_hidden_layers} 个 Block"), 9, "right"
    )
    places = ((42.4, 36.2, 32.8, "input_layernorm", "self_attn"), (27.6, 21.4, 18.0, "post_attention_layernorm", "mlp"))
    details = (
        f"{CONFIG.num_attention_heads} / {CONFIG.num_key_value_heads} heads x {CONFIG.head_size}",
        f"SwiGLU, {CONFIG.feed_forward_size}",
    )
    for (norm_y, part_y, plus_y, norm, part), detail, color in zip(places, details, (GREEN, ORANGE), strict=True):
        box(axes, 12, norm_y, 26, 3.2, norm, color=GREY)
        box(axes, 12, part_y, 26, 4.4, part, detail, color=color)
        axes.add_patch(Circle((25, plus_y), 1.1, fc="white", ec="#444444"))
        write(axes, 25, plus_y, "+", 11)
        arrow(axes, (25, norm_y), (25, part_y + 4.4))
        arrow(axes, (25, part_y), (25, plus_y + 1.1))
        above = norm_y + 4.2
        line(axes, (25, above), (8, above), (8, plus_y))
        arrow(axes, (8, plus_y), (23.9, plus_y))
        arrow(axes, (25, above), (25, norm_y + 3.2))
    arrow(axes, (25, 59), (25, 56.4))
    line(axes, (25, 52), (25, 47.4))
    arrow(axes, (25, 16.9), (25, 14.2))
    box(axes, 12, 11, 26, 3.2, "norm", color=GREY)
    arrow(axes, (25, 11), (25, 8.4))
    tied = say("the same matrix as embed_tokens", "与 embed_tokens 是同一个矩阵")
    box(axes, 12, 4, 26, 4.4, "lm_head", tied, color=BLUE)
    arrow(axes, (25, 4), (25, 1.8))
    write(axes, 25, 1, "logits  (B, T, 6400)", 9)
    write(axes, 49, 62.8, say("shape", "形状"), 8, "left", color="#666666")
    write(axes, 60, 62.8, say("parameters", "参数"), 8, "left", color="#666666")
    for y, count in ((54.2, CONFIG.vocab_size * d), (38.4, attention), (23.6, feed_forward)):
        write(axes, 49, y, f"(B, T, {d})", 8, "left")
        write(axes, 60, y, millions(count), 8, "left")
    write(axes, 49, 12.6, f"(B, T, {d})", 8, "left")
    write(axes, 49, 6.2, f"(B, T, {CONFIG.vocab_size})", 8, "left")
    write(axes, 60, 1, say("together ", "共 ") + millions(CONFIG.num_params()), 8, "left")
    return figure


def masks(say: Words) -> Figure:
    """Which keys a query sees: a whole text, documents in a window, new tokens after cached ones."""
    device = torch.device("cpu")
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    documents = document_mask(torch.tensor([0, 2, 5, 6]), torch.Size((1, 6))).allowed
    cached = causal_mask(3, 3, None, device).allowed
    assert documents is not None and cached is not None
    titles = (
        say("causal", "因果"),
        say("documents of 2, 3 and 1 tokens", "长 2、3、1 的三篇文档"),
        say("3 new tokens after 3 cached", "缓存 3 个之后的 3 个新词元"),
    )
    figure, axes = sheet(7.2, 2.6)
    for number, (title, mask) in enumerate(zip(titles, (causal, documents[0, 0], cached[0, 0]), strict=True)):
        x, size = 5 + 24 * number, 2.6
        write(axes, x + 3 * size, 24, title, 9)
        for key in range(mask.shape[1]):
            write(axes, x + (key + 0.5) * size, 21.6, str(key), 7)
        for query in range(len(mask)):
            position = query + mask.shape[1] - len(mask)
            write(axes, x - 1, 20.5 - (query + 0.5) * size, str(position), 7)
        grid(axes, x, 20.5, [[BLUE if seen else PALE[GREY] for seen in row] for row in mask.tolist()], size=size)
    write(axes, 36, 2.2, say("rows: queries; columns: keys; blue: may be seen", "行是查询，列是键；蓝色表示看得见"), 8)
    return figure


def rope(say: Words) -> Figure:
    """Four pairs as dials, and what YaRN does to each pair's frequency."""
    plain, stretched = (inverse_frequencies(ModelConfig(rope_scaling_factor=factor)) for factor in (1.0, 4.0))
    figure = plt.figure(figsize=(7.2, 3.0))
    for number, pair in enumerate((0, 4, 8, 12)):
        dial = figure.add_axes((0.03 + 0.125 * number, 0.3, 0.115, 0.42), projection="polar")
        dial.set(xticks=[], yticks=[], ylim=(0, 1))
        for position in range(8):
            angle = float(plain[pair]) * position
            dial.annotate(
                "",
                (angle, 0.95),
                (0, 0),
                arrowprops={"arrowstyle": "-|>", "color": BLUE, "alpha": 0.25 + 0.1 * position, "lw": 1},
            )
        figure.text(0.0875 + 0.125 * number, 0.78, say(f"pair {pair}", f"第 {pair} 对"), ha="center", fontsize=9)
        turn = f"{math.tau / float(plain[pair]):,.0f}"
        figure.text(0.0875 + 0.125 * number, 0.2, turn, ha="center", fontsize=8)
    figure.text(0.275, 0.92, say("positions 0 to 7 of a query", "一个查询在位置 0 到 7"), ha="center", fontsize=9)
    figure.text(0.275, 0.08, say("tokens for one whole turn", "转一整圈要多少个词元"), ha="center", fontsize=8)
    axes = figure.add_axes((0.62, 0.2, 0.36, 0.62))
    axes.plot((stretched / plain).tolist(), "o-", ms=2.5, lw=1, color=RED)
    axes.set(
        xlabel=say("pair", "维度对"),
        ylim=(0.2, 1.05),
        title=say("YaRN, factor 4: new frequency / old", "YaRN，倍数 4：新频率 / 旧频率"),
    )
    axes.title.set_fontsize(9)
    return figure


def heads(say: Words) -> Figure:
    """How many key/value heads serve eight query heads."""
    figure, axes = sheet(7.2, 2.7)
    for number, (name, kv) in enumerate((("MHA", 8), ("GQA", 4), ("MQA", 1))):
        left, width = 2 + 24 * number, 21.0
        size = cache_bytes_per_token(replace(CONFIG, num_key_value_heads=kv))
        write(axes, left + width / 2, 25, f"{name}", 10, weight="bold")
        for head in range(8):
            x = left + width * (head + 0.5) / 8
            target = left + width * (head * kv // 8 + 0.5) / kv
            color = RANKS[head * kv // 8 % 4]
            axes.add_patch(plt.Rectangle((x - 0.95, 18), 1.9, 3.2, fc=PALE[color], ec=color))
            write(axes, x, 19.6, "q", 8)
            axes.plot((x, target), (18, 12.2), color=color, lw=1)
        for head in range(kv):
            x, color = left + width * (head + 0.5) / kv, RANKS[head % 4]
            axes.add_patch(plt.Rectangle((x - 0.95, 9), 1.9, 3.2, fc=color, ec=color))
            write(axes, x, 10.6, "kv", 7, color="white")
        write(axes, left + width / 2, 5.6, say(f"cache: {size:,} bytes a token", f"缓存：每个词元 {size:,} 字节"), 8)
    write(
        axes,
        36,
        1.8,
        say("minimind3 has 8 query heads and 4 key/value heads", "minimind3 有 8 个查询头、4 个键值头"),
        8,
        color="#666666",
    )
    return figure


def cache(say: Words) -> Figure:
    """The cache grows by one column a step; what it weighs."""
    figure, axes = sheet(7.2, 2.8)
    steps = (4, 5, 6, 7)
    for row, length in enumerate(steps):
        y = 22 - 4.2 * row
        label = (
            say("prompt: 4 tokens", "提示：4 个词元")
            if row == 0
            else say(f"step {row}: 1 token", f"第 {row} 步：1 个词元")
        )
        write(axes, 1, y - 1.2, label, 8, "left")
        cells = [GREEN if row == 0 or place == length - 1 else PALE[GREEN] for place in range(length)]
        grid(axes, 14, y, [cells + [PALE[GREY]] * (8 - length)], size=2.4)
    write(axes, 23.6, 25, say("columns of the cache", "缓存里的列"), 8)
    write(
        axes,
        18,
        2.6,
        say("dark: written in this step; pale: read again, not computed", "深色：这一步写入；浅色：只读，不再计算"),
        8,
    )
    chart = figure.add_axes((0.61, 0.2, 0.37, 0.66))
    lengths = [2**power for power in range(9, 16)]
    for (name, kv), look in zip((("MHA", 8), ("GQA", 4), ("MQA", 1)), ("-", "--", ":"), strict=True):
        size = cache_bytes_per_token(replace(CONFIG, num_key_value_heads=kv))
        chart.plot(lengths, [size * length / 2**20 for length in lengths], look, color=BLUE, label=name)
    weights = CONFIG.num_params() * 2 / 2**20
    chart.axhline(weights, color=RED, lw=1)
    chart.text(540, weights * 1.15, say("all weights, 16 bit", "全部权重，16 位"), color=RED, fontsize=8)
    chart.set(
        xscale="log", yscale="log", xlabel=say("tokens", "词元"), title=say("MiB of one sequence", "一条序列的 MiB")
    )
    chart.title.set_fontsize(9)
    chart.set_xticks([512, 2048, 8192, 32768], ["512", "2,048", "8,192", "32,768"])
    chart.minorticks_off()
    chart.legend(fontsize=8)
    return figure


def activations(say: Words) -> Figure:
    """ReLU, GELU, SiLU and what a gate does."""
    figure = plt.figure(figsize=(7.2, 2.7))
    z = torch.linspace(-4, 3, 141, dtype=torch.float64)  # in float32 the last digits are each processor's own
    axes = figure.add_axes((0.07, 0.17, 0.4, 0.7))
    for (name, function), color in zip(
        (("ReLU", F.relu), ("GELU", F.gelu), ("SiLU", F.silu)), (GREY, ORANGE, BLUE), strict=True
    ):
        axes.plot(z, function(z), color=color, label=name)
    axes.set(title=say("activation of z", "z 的激活值"), xlabel="z")
    axes.legend(fontsize=8)
    axes = figure.add_axes((0.56, 0.17, 0.42, 0.7))
    for up, look in ((2.0, "-"), (1.0, "--"), (-1.0, ":")):
        axes.plot(z, F.silu(z) * up, look, color=BLUE, label=f"up = {up:g}")
    axes.set(title=say("SwiGLU: SiLU(gate) x up", "SwiGLU：SiLU(门) x up"), xlabel=say("gate", "门"))
    axes.legend(fontsize=8)
    for axes in figure.axes:
        axes.title.set_fontsize(9)
    return figure


def experts(say: Words) -> Figure:
    """Tokens of two ranks on their way to four experts and back."""
    chosen = ((0, 2, 1, 3), (2, 0, 3, 3))
    figure, axes = sheet(7.2, 3.4)
    columns = (3, 15, 36, 57)
    titles = (
        say("router", "路由器"),
        say("sorted", "按专家排序"),
        say("experts compute", "专家计算"),
        say("weighted sum", "加权求和"),
    )
    for x, title in zip(columns, titles, strict=True):
        write(axes, x + 5, 31.6, title, 9)
    for x in (30.4, 51.4):
        write(axes, x, 31.6, "all-to-all", 9, color=RED, weight="bold")
    slots: dict[int, int] = {}
    bottoms = (17, 2)
    rows_of = [bottoms[expert // 2] + 6 - 5 * (expert % 2) for expert in range(4)]
    for rank, y in enumerate(bottoms):
        axes.add_patch(plt.Rectangle((1, y - 0.6), 70, 13, fc="none", ec="#bbbbbb", ls="--"))
        write(axes, 1.6, y + 11.4, f"rank {rank}", 8, "left", color="#666666")
    for expert, row in enumerate(rows_of):
        box(axes, columns[2], row, 12, 4.2, color=RANKS[expert])
        write(axes, columns[2] + 6, row + 3.3, say(f"expert {expert}", f"专家 {expert}"), 7)
    for rank, y in enumerate(bottoms):
        for place, token in enumerate(sorted(range(4), key=lambda token: chosen[rank][token])):
            expert = chosen[rank][token]
            color, name = RANKS[expert], f"{'ab'[rank]}{token}"
            for x, row in ((columns[0] + 3, token), (columns[1] + 3, place), (columns[3] + 3, token)):
                grid(axes, x, y + 10 - 2.4 * row, [[color]], [[name]], 2.2)
            arrow(axes, (columns[0] + 5.4, y + 8.9 - 2.4 * token), (columns[1] + 2.8, y + 8.9 - 2.4 * place), color)
            slot = slots[expert] = slots.get(expert, -1) + 1
            x = columns[2] + 0.8 + 2.6 * slot
            row = rows_of[expert] + 2.4
            grid(axes, x, row, [[color]], [[name]], 2.2)
            arrow(axes, (columns[1] + 5.4, y + 8.9 - 2.4 * place), (columns[2] - 0.2, row - 0.3), color, alpha=0.8)
            arrow(axes, (columns[2] + 12.2, row - 0.3), (columns[3] + 2.8, y + 8.9 - 2.4 * token), color, alpha=0.8)
    return figure


def expert_loads(say: Words) -> Figure:
    """The router's choices before, and after its selection bias has been moved for some steps."""
    config = PRESETS["moe-64e"]
    config = ModelConfig(use_moe=True, num_experts=16, num_experts_per_tok=2, scoring_func=config.scoring_func)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2048, 16, generator=generator) + torch.linspace(1.5, -1.5, 16)
    bias, loads = torch.zeros(16), []
    for _ in range(301):
        _, chosen = route(logits, config, bias)
        loads.append(chosen.flatten().bincount(minlength=16))
        step_bias(bias, loads[-1], 0.001)
    figure, both = plt.subplots(1, 2, figsize=(7.2, 2.5), sharey=True)
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.2, top=0.86, wspace=0.08)
    titles = (
        say("before balancing", "均衡之前"),
        say("after 300 steps of the selection bias", "选择偏置走 300 步之后"),
    )
    for axes, title, load, color in zip(both, titles, (loads[0], loads[-1]), (RED, GREEN), strict=True):
        axes.bar(range(16), (load / load.float().mean()).tolist(), color=color)
        axes.axhline(1, color="#444444", lw=1, ls="--")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(say("expert", "专家"))
        axes.set_xticks(range(0, 16, 5))
    both[0].set_ylabel(say("load (1 = even)", "负载（1 为平均）"))
    return figure


PICTURES = {f.__name__: f for f in (whole_model, masks, rope, heads, cache, activations, experts, expert_loads)}
