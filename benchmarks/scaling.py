"""Larger worlds by arithmetic: bytes on the wire and time for 8 to 1024 GPUs, for each ZeRO stage and ep size, and by
counting: what the project itself does at the start, in a step, at a save and at a resume of many ranks.

    python benchmarks/scaling.py [--count]     # writes benchmarks/scaling.md; --count: counts anew, a minute or two

Derived from exact counts of operations and parameters, from stated bandwidths, and from `scaling_counts.json`. Every
assumption is in the page's head; the page's prose stays, its tables are replaced.
"""

import json
import math
import re
import sys

import tyro
from harness import ROOT, workspace

from minimind.config.run_config import preset
from minimind.model.config import ModelConfig

PAGE, COUNTS = ROOT / "benchmarks" / "scaling.md", ROOT / "benchmarks" / "scaling_counts.json"
WORLDS = (8, 16, 64, 256, 1024)
STAGES = (0, 1, 2, 3)
GPUS_PER_NODE = 8
OPERATIONS = 0.45 * 989e12  # a second: of an H200's peak in bf16 by the data sheet
# A GPU's share, in one direction, in bytes a second, as collectives reach them: 80% of the data sheet's.
INSIDE = 360e9  # NVLink 4: 450
BETWEEN = 40e9  # 400 Gbit/s a GPU: 50
LATENCY = 20e-6  # seconds of one step of a ring between nodes
SEQ_LEN, ACCUMULATION = 2048, 4
TOKENS = 8 * SEQ_LEN  # of a rank's micro-batch


def wire_bytes(
    config: ModelConfig, stage: int, world: int, ep_size: int = 1, accumulation: int = ACCUMULATION
) -> dict[str, float]:
    """Bytes that a rank sends in one optimizer step, by kind, as DeepSpeed 0.19 sends them with `ds_configs/` in bf16.

    A ring's all-gather or reduce-scatter of S bytes over N ranks sends S * (N - 1) / N a rank, an all-reduce twice
    that. Stage 0: one all-reduce of float32 gradients a step. 1: one of bf16 gradients, and an all-gather of the
    weights. 2: an all-reduce each micro-batch. 3: each micro-batch a reduce-scatter and two all-gathers of the weights,
    before the forward and before the backward pass (arXiv 1910.02054, section 7). Experts are divided by ep_size, and
    their gradients are reduced over world / ep_size ranks.
    """
    layers = sum(config.has_experts(layer) for layer in range(config.num_hidden_layers))
    routed = layers * config.num_experts * 3 * config.hidden_size * config.expert_feed_forward_size
    sent = {"gradients": 0.0, "weights": 0.0, "tokens": 0.0}
    for params, ranks in ((config.num_params() - routed, world), (routed / ep_size, world // ep_size)):
        once = params * (ranks - 1) / ranks
        sent["gradients"] += once * (2 * 4, 2 * 2, 2 * 2 * accumulation, 2 * accumulation)[stage]
        sent["weights"] += once * (0, 2, 2, 2 * 2 * accumulation)[stage]
    if ep_size > 1:
        row = config.hidden_size * 2 * config.num_experts_per_tok
        # There and back, in the forward and in the backward pass; 1 / ep_size of the tokens stay where they are.
        sent["tokens"] = 4 * layers * TOKENS * row * (ep_size - 1) / ep_size * accumulation
    return sent


def step_seconds(config: ModelConfig, stage: int, world: int, ep_size: int = 1) -> tuple[float, float]:
    """Seconds of computing and of communicating in one optimizer step, each as if it were alone."""
    computing = config.flops_per_token(SEQ_LEN) * TOKENS * ACCUMULATION / OPERATIONS
    sent = wire_bytes(config, stage, world, ep_size)
    nodes = max(1, world // GPUS_PER_NODE)
    rounds = (2, 3, 2 * ACCUMULATION + 1, 3 * ACCUMULATION)[stage]
    ring = (sent["gradients"] + sent["weights"]) / (INSIDE if nodes == 1 else BETWEEN)
    tokens = sent["tokens"] / (INSIDE if ep_size <= GPUS_PER_NODE else BETWEEN)
    return computing, ring + tokens + rounds * (nodes - 1) * LATENCY


def write_page(page: str) -> str:
    """The page with the present tables."""
    tables = {name: table(preset(name), 1) for name in ("minimind3", "large")}
    tables |= {f"moe-64e, ep_size {ep_size}": table(preset("moe-64e"), ep_size) for ep_size in (1, 8)}
    for title, content in {**tables, "The project itself": rank_table()}.items():
        page = re.sub(rf"(?ms)(^## {title}$.*?)^\|.*?^$", lambda match, new=content: match[1] + new + "\n", page)  # type: ignore[misc]
    return page


def table(config: ModelConfig, ep_size: int) -> str:
    """One row for each world: for each stage megabytes sent, seconds, and both efficiencies."""
    lines = ["| GPUs | computing, s |" + "".join(f" ZeRO {stage}: MB sent, s, efficiency |" for stage in STAGES)]
    lines.append("|---|---|" + "---|" * len(STAGES))
    for world in WORLDS:
        cells = []
        for stage in STAGES:
            computing, talking = step_seconds(config, stage, world, ep_size)
            sent = sum(wire_bytes(config, stage, world, ep_size).values()) / 1e6
            low, high = computing / (computing + talking), computing / max(computing, talking)
            # Stages 0 and 1 reduce when the backward pass has ended.
            cells.append(f" {sent:,.0f}, {talking:.3f}, {low:.0%}" + (f" to {high:.0%} |" if stage > 1 else " |"))
        lines.append(f"| {world} | {computing:.3f} |" + "".join(cells))
    return "\n".join(lines)


def log2(ranks: int) -> float:
    return math.ceil(math.log2(ranks))


# What, and the count that shows it; by how many ranks; what is still acceptable.
ROWS = (
    ("messages one after the other, a step's agreement", ("a step's agreement", "most", "hops"), log2, 34),
    ("the same of a save", ("save", "most", "hops"), lambda n: 11 * log2(n) + 1, 12_500),
    ("connections of a rank to others, a group", ("connections to other ranks", "most", "open"), log2, 500),
    ("questions of rank 0 to the store at the start", ("start", "most", "asked"), lambda n: 17, 20_000),
    ("messages of all ranks for a beat, a second", ("a beat", "sum", "asked"), lambda n: 2 * n + 2, 100_000),
    ("files opened by all at the start: 512 shards, at 4,096 ranks 14,901", ("start", "sum", "opened"),
     lambda n: 2 * SHARDS + n / 8 * 180 + n, 5_000_000),
    ("GB that one rank hashes at the resume of 70B (828 GB)", None, lambda n: 828 / n, 900),
    ("the same of 671B (8 TB)", None, lambda n: 8000 / n, 900),
    ("bytes a parameter that one rank reads and writes, on 3/4 of the ranks", ("resume on fewer ranks", "most", "read"),
     lambda n: 16 / n, 13),
)  # fmt: skip
SHARDS = 14_901  # 10^12 tokens in shards of the default size
MOST_RANKS = 1 << 17


def rank_table() -> str:
    """What was counted before (as it was written down) and now, by formula at 4,096 ranks, and the number at which it
    stops being acceptable."""
    counts = json.loads(COUNTS.read_text())
    before = counts["before, as the page has it"]
    lines = ["| what | acceptable | before: 64, 512, 4,096 ranks | stops at | now: 64, 512, 4,096 ranks | stops at |"]
    lines.append("|---|---|---|---|---|---|")
    for what, path, formula, most in ROWS:
        found = [counts["now"][size][path[0]][path[1]][path[2]] for size in ("64", "512")] if path else []
        by_formula = [formula(n) for n in (64, 512, 4096)[len(found) :]]
        figures = [f"{value:,}" for value in found]
        figures += [f"{round(value, 4 if value < 0.1 else 1 if value < 100 else None):,}*" for value in by_formula]
        is_fine = formula(MOST_RANKS) <= most
        stops = "beyond 131,072" if is_fine else f"{next(n for n in range(2, MOST_RANKS) if formula(n) > most):,}"
        lines.append(f"| {what} | {most:,} | {before[what]} | {', '.join(figures)} | {stops} |")
    return "\n".join(lines)


def main(count: bool = False) -> None:
    """Write the tables into the page, with `count` after what happens now was counted anew."""
    if count:
        sys.path.insert(0, str(ROOT / "tests" / "support"))
        import many_ranks

        counts = json.loads(COUNTS.read_text())
        for size in (64, 512):
            with workspace() as folder:
                counts["now"][str(size)] = many_ranks.count(size, folder)
        COUNTS.write_text(json.dumps(counts, indent=1) + "\n")
    PAGE.write_text(write_page(PAGE.read_text()))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    tyro.cli(main)
