"""Larger worlds by arithmetic: bytes on the wire and time for 8 to 1024 GPUs, for each ZeRO stage and ep size.

    python benchmarks/scaling.py            # writes benchmarks/scaling.md

Derived from exact counts of operations and parameters, from stated bandwidths, and from `weak_scaling.json`, which was
measured here. Every assumption is in the page's head.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import tyro
from harness import OUT, ROOT

from minimind.config.run_config import preset
from minimind.model.config import ModelConfig

WORLDS = (8, 16, 32, 64, 128, 256, 512, 1024)
STAGES = (0, 1, 2, 3)
BYTES = 2  # bf16 weights and gradients on the wire: DeepSpeed's default communication type in a bf16 run


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
    """Bytes that a rank sends in one optimizer step, by kind.

    A ring's all-gather or reduce-scatter of S bytes over N ranks sends S * (N - 1) / N a rank, an all-reduce twice
    that. Stage 0: one all-reduce of the gradients a step. 1: a reduce-scatter and an all-gather of the weights, which
    is the same. 2: a reduction each micro-batch, as it keeps a part of the gradients only. 3: beside that two
    all-gathers each micro-batch, before the forward and before the backward pass (arXiv 1910.02054, section 7).
    Experts are divided by ep_size, and their gradients are reduced over world / ep_size ranks.
    """
    total, config = job.config.num_params(), job.config
    layers = sum(config.has_experts(layer) for layer in range(config.num_hidden_layers))
    routed = layers * config.num_experts * 3 * config.hidden_size * config.expert_feed_forward_size
    sent = {"gradients": 0.0, "weights": 0.0, "tokens": 0.0}
    for params, ranks in ((total - routed, world), (routed / ep_size, world // ep_size)):
        once = params * BYTES * (ranks - 1) / ranks
        sent["gradients"] += once * {0: 1, 1: 1, 2: job.accumulation, 3: job.accumulation}[stage]
        sent["weights"] += once * {0: 1, 1: 1, 2: 1, 3: 2 * job.accumulation}[stage]
    if ep_size > 1:
        row = config.hidden_size * BYTES * config.num_experts_per_tok
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
    rounds = {0: 2, 1: 2, 2: job.accumulation + 1, 3: 3 * job.accumulation}[stage]
    latency = rounds * (nodes - 1) * cluster.latency * 1e-6
    ring = (sent["gradients"] + sent["weights"]) / (bandwidth * 1e9)
    return computing, ring + sent["tokens"] / (tokens_bandwidth * 1e9) + latency


PAGE = """# Larger worlds, by arithmetic

Made by `benchmarks/scaling.py`; nothing on this page was measured on a cluster. Seconds of computing are
the exact operations of a step over {cluster.mfu:.0%} of {cluster.peak_tflops} TFLOP/s (one H200 in bf16; \
the share is an aim, not a measurement).
Bandwidths a GPU and direction: {cluster.inside} GB/s inside a node of {cluster.gpus_per_node}, \
{cluster.between} GB/s between nodes
(80% of NVLink 4 and of 400 Gbit/s); {cluster.latency} us a ring step between nodes. Weights and
gradients travel in bf16. A rank takes 8 sequences of 2048 tokens, 4 times a step.

Efficiency: computing over computing plus communication, nothing overlapped (the lower bound), and over the
longer of the two (everything overlapped, the upper bound). A run lies between.

{measured}
{tables}
## Where it will stop scaling

{limits}

What helps, in this order: more accumulation (stages 0 and 1 talk once a step whatever it is), a larger
micro-batch, `zero3_hpz.json` (the all-gathers of stage 3 stay inside a node), and for experts an ep_size
that stays inside a node.
"""


def write_page(cluster: Cluster) -> str:
    """The whole page."""
    tables = "".join(
        f"\n## {name}{title}\n\n{table(Job(preset(name)), cluster, ep_size)}\n"
        for name, title, ep_size in (
            ("minimind3", "", 1), ("large", "", 1), ("moe-64e", ", ep_size 1", 1), ("moe-64e", ", ep_size 8", 8),
        )
    )  # fmt: skip
    return PAGE.format(cluster=cluster, measured=measured_part(), tables=tables, limits=limits(cluster))


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
            cells.append(f" {sent:,.0f}, {talking:.3f}, {low:.0%} to {high:.0%} |")
        lines.append(f"| {world} | {computing:.3f} |" + "".join(cells))
    return "\n".join(lines)


def limits(cluster: Cluster) -> str:
    """For each model and stage, the first world whose communication outlasts its computing."""
    lines = []
    for name in ("minimind3", "large", "moe-64e"):
        for stage in STAGES:
            times = {world: step_seconds(Job(preset(name)), cluster, stage, world) for world in WORLDS}
            beyond = [f"from {world} GPUs" for world, (computing, talking) in times.items() if talking > computing]
            found = [*beyond, f"not up to {WORLDS[-1]}"][0]
            lines.append(f"- {name}, ZeRO {stage}: communication outlasts computing {found}.")
    return "\n".join(lines)


def measured_part() -> str:
    """What the same ring cost where it was measured: two ranks on two cores."""
    path = OUT / "weak_scaling.json"
    if not path.exists():
        return "Measured here: nothing yet (`weak_scaling.json` is missing)."
    content = json.loads(path.read_text())
    seconds = {key: statistics.median(values) for key, values in content["measured"]["seconds_a_step"].items()}
    sent = sum(wire_bytes(Job(preset("minimind3")), 1, 2).values()) / 1e6
    return (
        f"Measured ({content['environment']['date'][:10]}, {content['environment']['cores']} cores): a ZeRO-1 step of "
        f"minimind3 takes {seconds['1']:.2f} s on one rank and {seconds['2']:.2f} s on two, an efficiency of "
        f"{content['claims'][0]['median']:.0%}; by the formula two ranks send {sent:,.0f} MB each a step."
    )


def main(output: Path = ROOT / "benchmarks" / "scaling.md") -> None:
    """Write the page into `output`."""
    output.write_text(write_page(Cluster()))
    print(f"wrote {output}")


if __name__ == "__main__":
    tyro.cli(main)
