"""The pictures of the training guide, from the code's own functions. Each gives a figure in one language."""

from itertools import accumulate

from matplotlib.figure import Figure
from paper import BLUE, GREEN, GREY, ORANGE, PALE, PURPLE, RANKS, RED, Words, arrow, box, grid, line, plt, sheet, write
from tables import SCORES, estimate, softmax

from minimind.config.run_config import TrainConfig
from minimind.training.lr_schedule import learning_rate


def training_flow(say: Words) -> Figure:
    """From text to an exported model: commands, and the files between them."""
    figure, axes = sheet(7.2, 4.4)
    box(axes, 2, 35, 13, 5.4, say("text", "文本"), ".jsonl .txt .parquet", color=GREY)
    box(axes, 22, 35, 18, 5.4, "data_prep", "train_tokenizer, tokenize_corpus", color=GREEN)
    box(axes, 47, 35, 22, 5.4, "data/shards", say("token ids, mapped into memory", "词元编号，映射进内存"), color=GREY)
    arrow(axes, (15, 37.7), (22, 37.7))
    arrow(axes, (40, 37.7), (47, 37.7))
    axes.add_patch(plt.Rectangle((2, 13.6), 67, 17, fc="none", ec=BLUE, ls="--"))
    write(
        axes, 11, 29.2, say("training, step by step, on every rank", "训练：每个 rank，一步一步"), 8, "left", color=BLUE
    )
    steps = (
        (3, "loader", say("this rank's windows", "本 rank 的窗口")),
        (17, "forward", say("logits, loss", "logits、损失")),
        (31, "backward", say("gradients, reduced", "梯度，归约")),
        (45, "clip, AdamW", say("lr of this step", "这一步的学习率")),
    )
    for x, name, detail in steps:
        box(axes, x, 20.6, 12, 5.4, name, detail, color=BLUE)
    for x in (15, 29, 43):
        arrow(axes, (x, 23.3), (x + 2, 23.3))
    line(axes, (51, 20.6), (51, 17), (23, 17))
    arrow(axes, (23, 17), (23, 20.6))
    write(axes, 37, 15.6, say("new weights for the next step", "下一步用新的权重"), 7.5)
    box(axes, 59, 20.6, 9, 5.4, "metrics", ".jsonl", color=GREY)
    arrow(axes, (57, 23.3), (59, 23.3))
    line(axes, (58, 35), (58, 32.4), (9, 32.4))
    arrow(axes, (9, 32.4), (9, 26))
    box(axes, 2, 3.4, 16, 5.4, "checkpoints/step_N", say("weights, moments, step", "权重、动量、步数"), color=ORANGE)
    line(axes, (51, 17), (51, 11.6), (10, 11.6))
    arrow(axes, (10, 11.6), (10, 8.8))
    box(axes, 24, 3.4, 12, 5.4, "evaluate", say("bits per byte", "每字节比特数"), color=PURPLE)
    box(axes, 40, 3.4, 12, 5.4, "generate, serve", say("text", "文本"), color=PURPLE)
    box(axes, 56, 3.4, 13, 5.4, "export", "Hugging Face, GGUF", color=PURPLE)
    arrow(axes, (18, 6.1), (24, 6.1))
    line(axes, (21, 6.1), (21, 1.6), (62, 1.6))
    arrow(axes, (46, 1.6), (46, 3.4))
    arrow(axes, (62, 1.6), (62, 3.4))
    return figure


def schedules(say: Words) -> Figure:
    """The learning rate over 1000 steps, by each schedule."""
    figure, axes = plt.subplots(figsize=(7.2, 2.7))
    figure.subplots_adjust(left=0.09, right=0.97, bottom=0.18, top=0.95)
    looks = {"cosine": "-", "linear": "--", "wsd": "-.", "constant": ":"}
    for (schedule, look), color in zip(looks.items(), (BLUE, ORANGE, GREEN, GREY), strict=True):
        train = TrainConfig(steps=1000, lr=5e-4, warmup_steps=50, schedule=schedule, min_lr_ratio=0.1)
        steps = range(0, 1000, 5)
        axes.plot(steps, [learning_rate(step, train) for step in steps], look, color=color, label=schedule)
    axes.set(xlabel=say("step", "步"), ylabel=say("learning rate", "学习率"), ylim=(0, 5.5e-4))
    axes.set_yticks([0, 1e-4, 2e-4, 3e-4, 4e-4, 5e-4], ["0", "1e-4", "2e-4", "3e-4", "4e-4", "5e-4"])
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0.08, 0.04))
    return figure


def zero_bytes(say: Words) -> Figure:
    """Bytes a rank holds in each ZeRO stage on 8 ranks, and what is sent in a step."""
    figure, axes = plt.subplots(figsize=(7.2, 3.1))
    figure.subplots_adjust(left=0.09, right=0.62, bottom=0.12, top=0.9)
    memory = [estimate("minimind3", stage, 8) for stage in range(4)]
    parts = (
        (say("weights", "权重"), [found.parameters for found in memory], BLUE),
        (say("gradients", "梯度"), [found.gradients for found in memory], ORANGE),
        (say("optimizer", "优化器"), [found.optimizer for found in memory], GREEN),
        (say("gathered for a moment", "临时聚集"), [found.gathered for found in memory], PALE[GREY]),
    )
    bottom = [0.0] * 4
    for name, sizes, color in parts:
        sizes = [size / 2**20 for size in sizes]
        axes.bar(range(4), sizes, 0.6, bottom, color=color, label=name, ec="white")
        bottom = [low + size for low, size in zip(bottom, sizes, strict=True)]
    for stage, height in enumerate(bottom):
        axes.text(stage, height + 15, f"{height:.0f}", ha="center", fontsize=8)
    axes.set_xticks(range(4), [f"ZeRO {stage}" for stage in range(4)])
    axes.set_title(
        say("MiB a rank: minimind3, bf16, 8 ranks", "每个 rank 的 MiB：minimind3，bf16，8 个 rank"), fontsize=9
    )
    axes.set_ylim(0, 1100)
    axes.legend(fontsize=8)
    lines = (
        (say("sent in a step", "一步之中传送什么"), ""),
        ("0", say("backward: all-reduce gradients", "反向：梯度 all-reduce")),
        ("1", say("backward: all-reduce gradients", "反向：梯度 all-reduce")),
        ("", say("step: all-gather new weights", "更新：all-gather 新权重")),
        ("2", say("the same; a rank keeps its piece", "同上；每个 rank 只留自己的一段")),
        ("", say("step: all-gather new weights", "更新：all-gather 新权重")),
        ("3", say("forward: all-gather, layer by layer", "前向：逐层 all-gather 权重")),
        ("", say("backward: again, and reduce-scatter", "反向：再来一次，并 reduce-scatter")),
    )
    for number, (left, right) in enumerate(lines):
        figure.text(0.65, 0.84 - 0.095 * number, left, fontsize=9, weight="bold")
        figure.text(0.68, 0.84 - 0.095 * number, right, fontsize=8)
    return figure


def data_order(say: Words) -> Figure:
    """The windows of one step, cut for one rank and for two, with accumulation."""
    figure, axes = sheet(7.2, 3.0)
    write(
        axes, 2, 27.4, say("the shuffled order: step s takes 8 windows", "打乱后的顺序：第 s 步取 8 个窗口"), 9, "left"
    )
    order = [[BLUE if 2 <= place <= 9 else PALE[GREY] for place in range(12)]]
    names = [[""] * 2 + [str(place) for place in range(8)] + [""] * 2]
    grid(axes, 2, 25.6, order, names, 3)
    cases = ((1, 2, 4, 2), (2, 2, 2, 38))
    for ranks, micro, accumulation, left in cases:
        title = say(
            f"ranks: {ranks}, micro-batches: {accumulation} of {micro}",
            f"rank 数 {ranks}，微批次 {accumulation} 个，各 {micro} 个窗口",
        )
        write(axes, left, 18.6, title, 9, "left")
        for rank in range(ranks):
            y = 16.6 - 6 * rank
            write(axes, left, y - 1.5, f"rank {rank}", 8, "left", color=RANKS[rank])
            for turn in range(accumulation):
                start = (turn * ranks + rank) * micro
                grid(axes, left + 6 + turn * 7, y, [[RANKS[rank]] * micro], [[str(start + i) for i in range(micro)]], 3)
    same = say("either way: the same 8 windows, the same gradient", "两种切法：同样的 8 个窗口，同样的梯度")
    write(axes, 2, 2.4, same, 8, "left")
    return figure


def sampling(say: Words) -> Figure:
    """Four tokens' probabilities by temperature, and what top-k and top-p leave."""
    figure, all_axes = plt.subplots(1, 5, figsize=(7.2, 2.4), sharey=True)
    figure.subplots_adjust(left=0.07, right=0.99, bottom=0.12, top=0.84, wspace=0.12)
    plain = softmax(SCORES)
    before = [0.0, *accumulate(plain)][:4]
    kept_p = [p if seen < 0.9 else 0.0 for p, seen in zip(plain, before, strict=True)]
    kept_k = [*plain[:2], 0.0, 0.0]
    cases = [
        (say(f"temperature {value:g}", f"温度 {value:g}"), softmax(SCORES, value), BLUE) for value in (0.5, 1.0, 2.0)
    ]
    cases += [
        ("top-k 2", [p / sum(kept_k) for p in kept_k], GREEN),
        ("top-p 0.9", [p / sum(kept_p) for p in kept_p], ORANGE),
    ]
    for axes, (title, bars, color) in zip(all_axes, cases, strict=True):
        axes.bar(list("ABCD"), plain, color=PALE[GREY])
        axes.bar(list("ABCD"), bars, 0.55, color=color)
        axes.set_title(title, fontsize=9)
        for place, p in enumerate(bars):
            axes.text(place, p + 0.02, f"{p:.2f}" if p else "-", ha="center", fontsize=7)
    all_axes[0].set_ylim(0, 1)
    all_axes[0].set_ylabel(say("probability", "概率"))
    return figure


def checkpoint_life(say: Words) -> Figure:
    """From the engine's memory to a checkpoint that is trusted, and what may become of it."""
    figure, axes = sheet(7.2, 3.0)
    stages = (
        (say("training stops", "训练暂停"), say("copy to host memory", "拷进主机内存"), BLUE),
        (say("temporary folder", "临时目录"), say("a file of each rank", "每个 rank 写自己的文件"), ORANGE),
        ("manifest.json", say("sizes and sha256", "大小和 sha256"), ORANGE),
        ("step_00001000", say("one rename", "一次改名"), GREEN),
        ("latest", say("now points here", "现在指向它"), GREEN),
    )
    for number, (name, detail, color) in enumerate(stages):
        box(axes, 1 + 14.2 * number, 20, 12.6, 5.6, name, detail, color=color)
        if number:
            arrow(axes, (14.2 * number - 0.6, 22.8), (1 + 14.2 * number, 22.8))
    write(
        axes,
        22,
        17.6,
        say("killed here: nothing that looks complete", "死在这里：不会留下看似完整的东西"),
        8,
        color=RED,
    )
    write(axes, 36, 27.8, say("written while training goes on", "写盘与训练并行"), 8, color="#666666")
    uses = (
        ("--resume auto", say("hashes, then the loss", "先查哈希，再对损失")),
        (say("other ranks", "换 rank 数"), say("each reads its part", "各读自己要持有的")),
        ("generate, export", say("whole tensors", "逐个完整张量")),
        ("--keep-last 3", say("older ones are deleted", "更旧的被删除")),
        (say("damaged", "损坏"), say("named and passed over", "指名并跳过")),
    )
    line(axes, (50, 20), (50, 13))
    line(axes, (7.3, 13), (64.1, 13))
    for number, (name, detail) in enumerate(uses):
        x = 1 + 14.2 * number
        color = RED if number == 4 else GREY if number == 3 else PURPLE
        box(axes, x, 4, 12.6, 5.6, name, detail, color=color)
        arrow(axes, (x + 6.3, 13), (x + 6.3, 9.6))
    return figure


PICTURES = {f.__name__: f for f in (training_flow, schedules, zero_bytes, data_order, sampling, checkpoint_life)}
