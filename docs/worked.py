"""Numbers worked by hand, for the pages: attention, a merge, the loss, a step of AdamW, a router's decision.

Plain arithmetic, so that each figure can be followed with a pencil; tests/test_docs_worked.py compares it with
the code of minimind/. Each function takes "en" or "zh" and gives Markdown. Needs no torch.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from tables import SCORES, format_table, softmax

Vector = Sequence[float]

WORDS = {"en": ("the", "cat", "sleeps"), "zh": ("猫", "在", "睡")}
QUERIES = ((1.0, 0.0), (0.0, 2.0), (1.0, 1.0))
KEYS = ((1.0, 0.0), (1.0, 1.0), (0.0, 2.0))
VALUES = ((1.0, 0.0), (0.0, 1.0), (2.0, 2.0))
SECOND_HEAD = ((0.0, 1.0), (1.0, 0.0), (0.5, 0.5))
"""What another head has found for the same three tokens."""
OUTPUT_ROW = (1.0, 0.0, 0.5, -1.0)
"""One row of o_proj: the weights of head 1's and head 2's two features in one feature of the result."""

TEXT = "the cat sat the rat sat the hat that"
ADAMW = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
GRADIENTS = (0.5, 0.5, -0.1)
ROUTER_LOGITS = ((2.0, 1.0, 0.0, -1.0), (1.0, 2.0, 0.0, 0.0), (2.0, 0.0, 1.0, 0.0), (0.0, 1.0, 0.0, 2.0))
"""Four tokens, four experts, of which each token takes two."""


def row_of(values: Vector, digits: int = 3) -> list[str]:
    return [f"{value:.{digits}f}" for value in values]


def attention_scores() -> list[list[float]]:
    """QK^T / sqrt(d_h), (3, 3), before the mask."""
    return [[sum(a * b for a, b in zip(q, k, strict=True)) / math.sqrt(2) for k in KEYS] for q in QUERIES]


def attention_weights() -> list[list[float]]:
    """The softmax of each query's scores over the keys up to itself; 0 beyond."""
    rows = [softmax(scores[: place + 1]) for place, scores in enumerate(attention_scores())]
    return [[*row, *[0.0] * (3 - len(row))] for row in rows]


def attention_outputs() -> list[list[float]]:
    """The mean of the values by those weights, (3, 2)."""
    return [[sum(w * v[i] for w, v in zip(row, VALUES, strict=True)) for i in (0, 1)] for row in attention_weights()]


def attention(language: str) -> str:
    """Scores, weights and output of three tokens in one head of width 2."""
    words = WORDS[language]
    head = {"en": ["query", "q", "scores", "after the mask", "weights", "output"]}
    head["zh"] = ["查询", "q", "分数", "加掩码", "权重", "输出"]
    rows = []
    for place, scores in enumerate(attention_scores()):
        masked = [*row_of(scores[: place + 1]), *["-∞"] * (2 - place)]
        weights, output = attention_weights()[place], attention_outputs()[place]
        query = ", ".join(f"{value:g}" for value in QUERIES[place])
        rows.append([words[place], query, *map(", ".join, (row_of(scores), masked, row_of(weights), row_of(output)))])
    return format_table(head[language], rows)


def output_mix(language: str) -> str:
    """One feature that o_proj makes of both heads' outputs, for each token."""
    head = {"en": ["token", "head 1", "head 2", "row of `o_proj`", "feature"]}
    head["zh"] = ["词元", "头 1", "头 2", "`o_proj` 的一行", "得到的特征"]
    rows = []
    for word, one, two in zip(WORDS[language], attention_outputs(), SECOND_HEAD, strict=True):
        feature = sum(w * x for w, x in zip(OUTPUT_ROW, (*one, *two), strict=True))
        weights = ", ".join(f"{weight:g}" for weight in OUTPUT_ROW)
        rows.append([word, ", ".join(row_of(one)), ", ".join(row_of(two)), weights, f"{feature:.3f}"])
    return format_table(head[language], rows)


def merges(count: int) -> list[tuple[tuple[str, str], int, list[list[str]]]]:
    """(pair, how often it stood there, the words afterwards) of the first merges of TEXT; none crosses a blank."""
    words = [list(word) for word in TEXT.split()]
    found = []
    for _ in range(count):
        pairs = Counter(pair for word in words for pair in pairwise(word))
        best, times = pairs.most_common(1)[0]
        words = [merge(word, best) for word in words]
        found.append((best, times, words))
    return found


def merge(word: Sequence[str], pair: tuple[str, str]) -> list[str]:
    """The word with each occurrence of the pair made one token."""
    merged: list[str] = []
    for piece in word:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def bpe(language: str) -> str:
    """The first merges of a small text."""
    head = {"en": ["merge", "most frequent pair", "times", "the text afterwards", "tokens"]}
    head["zh"] = ["第几次合并", "最常见的一对", "次数", "合并之后的文本", "词元数"]
    rows: list[list[str]] = []
    for number, (pair, times, words) in enumerate(merges(3), start=1):
        text = "` `".join(" ".join(word) for word in words)
        count = sum(map(len, words))
        rows.append([str(number), f"`{pair[0]}` + `{pair[1]}`", str(times), f"`{text}`", str(count)])
    return format_table(head[language], rows)


def loss(language: str) -> str:
    """From four logits to the loss of the target B and its gradient."""
    head = {"en": ["token", "logit $z$", "$e^z$", "probability $p$", r"$\partial\mathcal{L}/\partial z$"]}
    head["zh"] = ["词元", "logit $z$", "$e^z$", "概率 $p$", r"$\partial\mathcal{L}/\partial z$"]
    rows = []
    for name, logit, p in zip("ABCD", SCORES, softmax(SCORES), strict=True):
        gradient = p - (name == "B")
        rows.append((name, f"{logit:g}", f"{math.exp(logit):.3f}", f"{p:.4f}", f"{gradient:+.4f}"))
    return format_table(head[language], rows)


def adamw_steps() -> list[tuple[float, ...]]:
    """(g, m, v, m-hat, v-hat, theta) after each of three steps of one weight that begins at 1."""
    theta, m, v = 1.0, 0.0, 0.0
    beta1, beta2 = ADAMW["betas"]
    steps = []
    for t, g in enumerate(GRADIENTS, start=1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        theta -= ADAMW["lr"] * (m_hat / (math.sqrt(v_hat) + ADAMW["eps"]) + ADAMW["weight_decay"] * theta)
        steps.append((g, m, v, m_hat, v_hat, theta))
    return steps


def adamw(language: str) -> str:
    """Three steps of AdamW on one weight."""
    head = ["$t$", "$g$", "$m$", "$v$", r"$\hat m$", r"$\hat v$", r"$\hat m/\sqrt{\hat v}$", r"$\theta$"]
    rows = []
    for t, (g, m, v, m_hat, v_hat, theta) in enumerate(adamw_steps(), start=1):
        rows.append([t, f"{g:g}", *row_of((m, v, m_hat, v_hat, m_hat / math.sqrt(v_hat), theta), 4)])
    return format_table(head, rows)


def routed() -> list[tuple[list[float], list[int], list[float]]]:
    """(scores, the two experts chosen, their weights) of each token, with norm_topk_prob."""
    found = []
    for logits in ROUTER_LOGITS:
        scores = softmax(logits)
        chosen = sorted(range(4), key=lambda i: -scores[i])[:2]
        together = sum(scores[i] for i in chosen)
        found.append((scores, chosen, [scores[i] / together for i in chosen]))
    return found


def balance() -> tuple[list[float], list[float], float]:
    """(f, P, their product's sum): 4 times the share of choices, and the mean score, of each expert."""
    tokens = routed()
    chosen = Counter(i for _, experts, _ in tokens for i in experts)
    f = [4 * chosen[i] / sum(chosen.values()) for i in range(4)]
    p = [sum(scores[i] for scores, _, _ in tokens) / len(tokens) for i in range(4)]
    return f, p, sum(a * b for a, b in zip(f, p, strict=True))


def router(language: str) -> str:
    """Which experts four tokens go to, and how evenly."""
    head = {"en": ["token", "logits", "scores", "experts", "weights"], "zh": ["词元", "logits", "分数", "专家", "权重"]}
    rows: list[Sequence[str]] = []
    for token, (scores, chosen, weights) in enumerate(routed()):
        logits = ", ".join(f"{value:g}" for value in ROUTER_LOGITS[token])
        experts = ", ".join(map(str, chosen))
        rows.append([str(token), logits, ", ".join(row_of(scores)), experts, ", ".join(row_of(weights))])
    f, p, _ = balance()
    rows += [["$f_i$", "", ", ".join(row_of(f)), "", ""], ["$P_i$", "", ", ".join(row_of(p)), "", ""]]
    return format_table(head[language], rows)


def read_practice() -> dict[str, dict[str, list[str] | list[int] | str]]:
    """What each section lets its reader do, by the section's anchor: code and what it prints, why, and exercises."""
    entries = json.loads((Path(__file__).parent / "practice.json").read_text(encoding="utf-8"))
    return {entry["section"]: entry for entry in entries}


def practice(section: str, language: str) -> str:
    """A section's end: something to try, and something to build."""
    entry = read_practice()[section]
    tries, builds = {"en": ("Try it.", "Build it."), "zh": ("试一试。", "做一做。")}[language]
    word = {"en": "Exercise", "zh": "练习"}[language]
    shown = "\n".join(("```python", *entry["code"], "```", "", "```text", *entry["prints"], "```"))
    links = [f"[{word} {n}](exercises.md#e{n:02})`bash launch/exercise.sh {n}`" for n in entry["exercises"]]
    colon, comma = {"en": (": ", ", "), "zh": ("：", "；")}[language]
    links = [link.replace("`bash", f"{colon}`bash") for link in links]
    return f"**{tries}** {entry[language]}\n\n{shown}\n\n**{builds}** {comma.join(links)}\n"


WORKED: dict[str, Callable[[str], str]] = {
    "attention_by_hand": attention,
    "output_mix": output_mix,
    "bpe_by_hand": bpe,
    "loss_by_hand": loss,
    "adamw_by_hand": adamw,
    "router_by_hand": router,
}
WORKED |= {f"practice:{name}": lambda language, name=name: practice(name, language) for name in read_practice()}
