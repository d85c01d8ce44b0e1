"""Rules of thumb applied to a planned run; each yields warnings, with a figure and what to do, or nothing."""

import math

from minimind.reports.plan.activations import precision_of
from minimind.reports.plan.planned_run import PlannedRun
from minimind.units import format_bytes

FEWEST_STEPS = 1000
"""Below this, a schedule has hardly begun before it ends."""
LARGEST_BATCH_TOKENS = 4_000_000
LONGEST_WARMUP = 0.1
LR_FACTOR = 6.0
FEWEST_TOKENS_PER_PARAMETER = 5.0


def advise(plan: PlannedRun) -> list[str]:
    """Every warning that applies, the gravest first."""
    rules = (_fits, _length, _schedule, _stage, _experts, _throughput)
    return [line for rule in rules for line in rule(plan)]


def usual_learning_rate(num_params: int) -> float:
    """The peak rate that Adam takes at this size: 0.003239 - 0.0001395 ln N (arXiv 2001.08361, appendix D.6)."""
    return max(1e-5, 0.003239 - 0.0001395 * math.log(num_params))


def _fits(plan: PlannedRun) -> list[str]:
    if plan.memory.total <= plan.limit:
        return []
    found = f"{format_bytes(plan.memory.total)} a rank do not fit {format_bytes(plan.limit)}"
    train = plan.resolved.train
    if plan.largest_micro_batch:
        return [f"{found}: lower --micro-batch-size {train.micro_batch_size} to {plan.largest_micro_batch}"]
    fitting = [name for name, other in plan.without.items() if other.total <= plan.limit]
    if fitting:
        return [f"{found}, whatever the micro-batch: {fitting[0]} would fit"]
    checkpoint = "" if train.activation_checkpointing else ", try --activation-checkpointing"
    return [f"{found} in any stage: take more GPUs or a smaller model{checkpoint}"]


def _length(plan: PlannedRun) -> list[str]:
    run, lines = plan.resolved, []
    batch = run.train.global_batch_size * run.data.seq_len
    if plan.tokens is not None and plan.steps is not None:
        if plan.steps < FEWEST_STEPS:
            wanted = plan.tokens // FEWEST_STEPS // run.data.seq_len
            if wanted >= plan.world_size:
                lines.append(
                    f"the global batch of {batch:,} tokens is too large for {plan.tokens:,}: {plan.steps:,} steps; "
                    f"{wanted:,} sequences a step would give about {FEWEST_STEPS:,}"
                )
            else:
                lines.append(f"too few steps: {plan.steps:,}; a schedule needs about {FEWEST_STEPS:,} to do its work")
        ratio = plan.tokens / run.model.num_active_params()
        if ratio < FEWEST_TOKENS_PER_PARAMETER:
            lines.append(
                f"{ratio:.1f} tokens a parameter: a smaller model would learn more from them (about 20 are the best "
                "use of a fixed amount of compute, arXiv 2203.15556)"
            )
    if batch > LARGEST_BATCH_TOKENS:
        lines.append(
            f"the global batch of {batch:,} tokens is larger than models of this size profit from: at most about "
            f"{LARGEST_BATCH_TOKENS:,}"
        )
    return lines


def _schedule(plan: PlannedRun) -> list[str]:
    train, lines = plan.resolved.train, []
    if train.warmup_steps and plan.steps:
        if train.warmup_steps >= plan.steps:
            lines.append(f"the warm-up of {train.warmup_steps:,} steps is as long as the run of {plan.steps:,}")
        elif train.warmup_steps > LONGEST_WARMUP * plan.steps:
            lines.append(f"the warm-up takes {train.warmup_steps / plan.steps:.0%} of the run; 1% to 5% is usual")
    if train.optimizer == "adamw":
        usual = usual_learning_rate(plan.resolved.model.num_params())
        if not usual / LR_FACTOR <= train.lr <= usual * LR_FACTOR:
            where = "above" if train.lr > usual else "below"
            lines.append(f"lr {train.lr:g} is far {where} what is usual at this size, about {usual:.1g}")
    return lines


def _stage(plan: PlannedRun) -> list[str]:
    zero, lines = plan.resolved.zero, []
    fitting = [name for name, other in plan.without.items() if other.total <= plan.limit]
    simpler = [name for name in ("ZeRO 1", "ZeRO 2", "ZeRO 3") if name in fitting]
    if zero.offloaded and simpler:
        lines.append(f"offload costs much speed, and {simpler[0]} without it fits")
    elif zero.stage == 3 and not zero.offloaded and {"ZeRO 1", "ZeRO 2"} & set(fitting):
        lines.append(f"ZeRO 3 sends every weight twice a step, and {simpler[0]} fits")
    if zero.stage == 3 and plan.num_nodes > 1 and zero.hpz_partition_size == 1:
        lines.append("ZeRO 3 over several nodes without zero_hpz_partition_size: weights cross the network each step")
    if plan.memory.buckets > max(2**30, plan.memory.states):
        lines.append(
            f"the buckets take {format_bytes(plan.memory.buckets)}, more than the model's own states: lower "
            f"reduce_bucket_size {zero.reduce_bucket_size:,}"
        )
    return lines


def _experts(plan: PlannedRun) -> list[str]:
    model = plan.resolved.model
    if not model.use_moe:
        return []
    train = plan.resolved.train
    ep_size = train.ep_size
    here, lines = model.num_experts // ep_size, []
    if ep_size > 1 and here < 2:
        lines.append(
            f"{here} expert a rank: its load decides the rank's time; lower --ep-size {ep_size} for at least two"
        )
    tokens = train.micro_batch_size * plan.resolved.data.seq_len * ep_size
    each = tokens * model.num_experts_per_tok // model.num_experts
    if each < 128:
        lines.append(f"{each} tokens an expert in a forward: products as small as that leave a GPU idle")
    return lines


def _throughput(plan: PlannedRun) -> list[str]:
    train, lines = plan.resolved.train, []
    accumulates = train.gradient_accumulation_steps > 1
    micro, largest = train.micro_batch_size, plan.largest_micro_batch
    if plan.memory.total <= plan.limit and accumulates and largest >= 2 * micro:
        lines.append(f"the micro-batch may grow from {micro} to {largest}, with less accumulation for the same batch")
    if train.activation_checkpointing and plan.recomputing_nothing.total < plan.limit:
        lines.append("activation checkpointing costs about a third of the time, and the run fits without it")
    if precision_of(plan.resolved)[0] == 4 and plan.limit > 2**33:
        lines.append("fp32 runs many times slower than bf16 on present GPUs; --precision bf16")
    return lines
