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
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from harness import ROOT

from minimind.config.run_config import preset
from minimind.model.config import ModelConfig

WORLDS = (8, 16, 64, 256, 1024)
STAGES = (0, 1, 2, 3)
COUNTS = ROOT / "benchmarks" / "scaling_counts.json"


@dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs. Bandwidths are a GPU's share, in one direction, in GB a second, as collectives reach them."""

    gpus_per_node: int = 8
    peak_tflops: int = 989  # H200, bf16, data sheet
    mfu: float = 0.45
    inside: int = 360  # NVLink 4: 450 by the data sheet, 80% of it in large collectives
    between: int = 40  # 400 Gbit/s a GPU: 50, 80% of it
    latency: int = 20  # microseconds of one step of a ring between nodes


@dataclass(frozen=True)
class Job:
    """One rank's work in an optimizer step."""

    config: ModelConfig
    seq_len: int = 2048
    micro_batch_size: int = 8
    accumulation: int = 4

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.seq_len * self.micro_batch_size


def wire_bytes(job: Job, stage: int, world: int, ep_size: int = 1) -> dict[str, float]:
    """Bytes that a rank sends in one optimizer step, by kind, as DeepSpeed 0.19 sends them with `ds_configs/` in bf16.

    A ring's all-gather or reduce-scatter of S bytes over N ranks sends S * (N - 1) / N a rank, an all-reduce twice
    that. Stage 0: one all-reduce of float32 gradients a step. 1: one of bf16 gradients, and an all-gather of the
    weights. 2: an all-reduce each micro-batch. 3: each micro-batch a reduce-scatter and two all-gathers of the weights,
    before the forward and before the backward pass (arXiv 1910.02054, section 7). Experts are divided by ep_size, and
    their gradients are reduced over world / ep_size ranks.
    """
    total, config = job.config.num_params(), job.config
    layers = sum(config.has_experts(layer) for layer in range(config.num_hidden_layers))
    routed = layers * config.num_experts * 3 * config.hidden_size * config.expert_feed_forward_size
    sent = {"gradients": 0.0, "weights": 0.0, "tokens": 0.0}
    for params, ranks in ((total - routed, world), (routed / ep_size, world // ep_size)):
        once = params * (ranks - 1) / ranks
        sent["gradients"] += once * (2 * 4, 2 * 2, 2 * 2 * job.accumulation, 2 * job.accumulation)[stage]
        sent["weights"] += once * (0, 2, 2, 2 * 2 * job.accumulation)[stage]
    if ep_size > 1:
        row = config.hidden_size * 2 * config.num_experts_per_tok
        # There and back, in the forward and in the backward pass; 1 / ep_size of the tokens stay where they are.
        sent["tokens"] = 4 * layers * job.tokens * row * (ep_size - 1) / ep_size * job.accumulation
    return sent


def step_seconds(job: Job, cluster: Cluster, stage: int, world: int, ep_size: int = 1) -> tuple[float, float]:
    """Seconds of computing and of communicating in one optimizer step, each as if it were alone."""
    operations = job.config.flops_per_token(job.seq_len) * job.tokens * job.accumulation
    computing = operations / (cluster.peak_tflops * 1e12 * cluster.mfu)
    sent = wire_bytes(job, stage, world, ep_size)
    nodes = max(1, world // cluster.gpus_per_node)
    bandwidth = cluster.inside if nodes == 1 else cluster.between
    tokens_bandwidth = cluster.inside if ep_size <= cluster.gpus_per_node else cluster.between
    rounds = (2, 3, 2 * job.accumulation + 1, 3 * job.accumulation)[stage]
    latency = rounds * (nodes - 1) * cluster.latency * 1e-6
    ring = (sent["gradients"] + sent["weights"]) / (bandwidth * 1e9)
    return computing, ring + sent["tokens"] / (tokens_bandwidth * 1e9) + latency


def write_page(page: str, cluster: Cluster) -> str:
    """The page with the present tables."""
    models = {"minimind3": ("minimind3", 1), "large": ("large", 1)}
    models |= {f"moe-64e, ep_size {ep_size}": ("moe-64e", ep_size) for ep_size in (1, 8)}
    tables = {title: table(Job(preset(name)), cluster, ep_size) for title, (name, ep_size) in models.items()}
    for title, content in {**tables, "The project itself": rank_table()}.items():
        page = re.sub(rf"(?ms)(^## {title}$.*?)^\|.*?^$", lambda match, new=content: match[1] + new + "\n", page)  # type: ignore[misc]
    return page


def table(job: Job, cluster: Cluster, ep_size: int) -> str:
    """One row for each world: for each stage megabytes sent, seconds, and both efficiencies."""
    lines = ["| GPUs | computing, s |" + "".join(f" ZeRO {stage}: MB sent, s, efficiency |" for stage in STAGES)]
    lines.append("|---|---|" + "---|" * len(STAGES))
    for world in WORLDS:
        cells = []
        for stage in STAGES:
            computing, talking = step_seconds(job, cluster, stage, world, ep_size)
            sent = sum(wire_bytes(job, stage, world, ep_size).values()) / 1e6
            low, high = computing / (computing + talking), computing / max(computing, talking)
            # Stages 0 and 1 reduce when the backward pass has ended.
            cells.append(f" {sent:,.0f}, {talking:.3f}, {low:.0%}" + (f" to {high:.0%} |" if stage > 1 else " |"))
        lines.append(f"| {world} | {computing:.3f} |" + "".join(cells))
    return "\n".join(lines)


def log2(ranks: int) -> float:
    return math.ceil(math.log2(ranks))


# What, and the count that shows it; by how many ranks, before and now; what is still acceptable.
ROWS = (
    ("messages one after the other, a step's agreement", ("a step's agreement", "most", "hops"),
     lambda n: 2 * (n - 1), log2, 34),
    ("the same of a save", ("save", "most", "hops"),
     lambda n: 12 * (n - 1) + log2(n), lambda n: 11 * log2(n) + 1, 12_500),
    ("connections of a rank to others, a group", ("connections to other ranks", "most", "open"),
     lambda n: n - 1, log2, 500),
    ("questions of rank 0 to the store at the start", ("start", "most", "asked"),
     lambda n: 11.8 * n, lambda n: 17, 20_000),
    ("messages of all ranks for a beat, a second", ("a beat", "sum", "asked"),
     lambda n: 2 * n + 2, lambda n: 2 * n + 2, 100_000),
    ("files opened by all at the start: 512 shards, at 4,096 ranks 14,901", ("start", "sum", "opened"),
     lambda n: n * (2 * SHARDS + 174), lambda n: 2 * SHARDS + n / 8 * 180 + n, 5_000_000),
    ("GB that one rank hashes at the resume of 70B (828 GB)", None, lambda n: 828, lambda n: 828 / n, 900),
    ("the same of 671B (8 TB)", None, lambda n: 8000, lambda n: 8000 / n, 900),
    ("bytes a parameter that one rank reads and writes, on 3/4 of the ranks", ("resume on fewer ranks", "most", "read"),
     lambda n: 48, lambda n: 16 / n, 13),
)  # fmt: skip
SHARDS = 14_901  # 10^12 tokens in shards of the default size
MOST_RANKS = 1 << 17


def rank_table() -> str:
    """What was counted before and now, by formula at 4,096 ranks, and the number at which it stops being acceptable."""
    counts = json.loads(COUNTS.read_text())
    lines = ["| what | acceptable | before: 64, 512, 4,096 ranks | stops at | now: 64, 512, 4,096 ranks | stops at |"]
    lines.append("|---|---|---|---|---|---|")
    for what, path, before, now, most in ROWS:
        cells = []
        for name, formula in (("before", before), ("now", now)):
            there = path and path[0] in counts[name]["64"]
            found = [counts[name][size][path[0]][path[1]][path[2]] for size in ("64", "512")] if there else []
            figures = [f"{value:,}" for value in found]
            by_formula = [formula(n) for n in (64, 512, 4096)[len(found) :]]
            figures += [f"{round(value, 4 if value < 0.1 else 1 if value < 100 else None):,}*" for value in by_formula]
            is_fine = formula(MOST_RANKS) <= most
            stops = None if is_fine else next(n for n in range(2, MOST_RANKS) if formula(n) > most)
            cells.append(f" {', '.join(figures)} | {f'{stops:,}' if stops else 'beyond 131,072'} |")
        lines.append(f"| {what} | {most:,} |" + "".join(cells))
    return "\n".join(lines)


def count_ranks() -> None:
    """Count anew what happens now."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from many_ranks import count

    counts = json.loads(COUNTS.read_text())
    for size in (64, 512):
        with tempfile.TemporaryDirectory() as folder:
            counts["now"][str(size)] = count(size, Path(folder))
    COUNTS.write_text(json.dumps(counts, indent=1) + "\n")


def main(output: Path = ROOT / "benchmarks" / "scaling.md", count: bool = False) -> None:
    """Write the tables into `output`."""
    if count:
        count_ranks()
    output.write_text(write_page(output.read_text(), Cluster()))
    print(f"wrote {output}")


if __name__ == "__main__":
    tyro.cli(main)
