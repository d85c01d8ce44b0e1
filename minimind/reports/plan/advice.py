"""Rules of thumb applied to a planned run; each yields warnings, with a figure and what to do, or nothing."""

import math
from collections.abc import Iterator

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


def _fits(plan: PlannedRun) -> Iterator[str]:
    if plan.own.memory.total <= plan.limit:
        return
    found = f"{format_bytes(plan.own.memory.total)} a rank do not fit {format_bytes(plan.limit)}"
    train = plan.resolved.train
    if plan.own.largest:
        yield f"{found}: lower --micro-batch-size {train.micro_batch_size} to {plan.own.largest}"
    elif plan.fitting:
        yield f"{found}, whatever the micro-batch: {plan.fitting[0]} would fit"
    else:
        checkpoint = "" if train.activation_checkpointing else ", try --activation-checkpointing"
        yield f"{found} in any stage: take more GPUs or a smaller model{checkpoint}; --propose looks further"


def _length(plan: PlannedRun) -> Iterator[str]:
    run, tokens, steps = plan.resolved, plan.tokens, plan.steps
    batch = run.train.global_batch_size * run.data.seq_len
    if tokens is not None and steps is not None:
        wanted = tokens // FEWEST_STEPS // run.data.seq_len
        if steps < FEWEST_STEPS and wanted >= plan.resolved.dp_size:
            yield (
                f"the global batch of {batch:,} tokens is too large for {tokens:,}: {steps:,} steps; "
                f"{wanted:,} sequences a step would give about {FEWEST_STEPS:,}"
            )
        elif steps < FEWEST_STEPS:
            yield f"too few steps: {steps:,}; a schedule needs about {FEWEST_STEPS:,} to do its work"
        ratio = tokens / run.model.num_active_params()
        if ratio < FEWEST_TOKENS_PER_PARAMETER and run.train.init_from is None and not run.train.keeps_frozen:
            yield (
                f"{ratio:.1f} tokens a parameter: a smaller model would learn more from them (about 20 are the best "
                "use of a fixed amount of compute, arXiv 2203.15556)"
            )
    if batch > LARGEST_BATCH_TOKENS:
        yield (
            f"the global batch of {batch:,} tokens is larger than models of this size profit from: at most about "
            f"{LARGEST_BATCH_TOKENS:,}"
        )


def _schedule(plan: PlannedRun) -> Iterator[str]:
    train, steps = plan.resolved.train, plan.steps
    if steps and train.warmup_steps >= steps:
        yield f"the warm-up of {train.warmup_steps:,} steps is as long as the run of {steps:,}"
    elif steps and train.warmup_steps > LONGEST_WARMUP * steps:
        yield f"the warm-up takes {train.warmup_steps / steps:.0%} of the run; 1% to 5% is usual"
    if train.optimizer == "adamw" and train.lora is None:
        usual = usual_learning_rate(plan.resolved.model.num_params())
        if not usual / LR_FACTOR <= train.lr <= usual * LR_FACTOR:
            where = "above" if train.lr > usual else "below"
            yield f"lr {train.lr:g} is far {where} what is usual at this size, about {usual:.1g}"


def _stage(plan: PlannedRun) -> Iterator[str]:
    zero, memory = plan.resolved.zero, plan.own.memory
    simpler = [name for name in plan.fitting if name in ("ZeRO 1", "ZeRO 2", "ZeRO 3")]
    if zero.offloaded and simpler:
        yield f"offload costs much speed, and {simpler[0]} without it fits"
    elif zero.stage == 3 and not zero.offloaded and simpler and simpler[0] != "ZeRO 3":
        yield f"ZeRO 3 sends every weight twice a step, and {simpler[0]} fits"
    if zero.stage == 3 and plan.options.num_nodes > 1 and zero.hpz_partition_size == 1:
        yield "ZeRO 3 over several nodes without zero_hpz_partition_size: weights cross the network each step"
    if memory.buckets > max(2**30, memory.states):
        yield (
            f"the buckets take {format_bytes(memory.buckets)}, more than the model's own states: lower "
            f"reduce_bucket_size {zero.reduce_bucket_size:,}"
        )


def _experts(plan: PlannedRun) -> Iterator[str]:
    model, train = plan.resolved.model, plan.resolved.train
    if not model.use_moe:
        return
    here = model.num_experts // train.ep_size
    if train.ep_size > 1 and here < 2:
        yield f"{here} expert a rank: its load decides the time; lower --ep-size {train.ep_size} for at least two"
    tokens = train.micro_batch_size * plan.resolved.data.seq_len * train.ep_size
    each = tokens * model.num_experts_per_tok // model.num_experts
    if each < 128:
        yield f"{each} tokens an expert in a forward: products as small as that leave a GPU idle"


def _throughput(plan: PlannedRun) -> Iterator[str]:
    train, own = plan.resolved.train, plan.own
    micro, largest = train.micro_batch_size, own.largest
    if own.memory.total <= plan.limit and train.gradient_accumulation_steps > 1 and largest >= 2 * micro:
        yield f"the micro-batch may grow from {micro} to {largest}, with less accumulation for the same batch"
    if train.activation_checkpointing and plan.recomputing_nothing.total < plan.limit:
        yield "activation checkpointing costs about a third of the time, and the run fits without it"
    if precision_of(plan.resolved)[0] == 4 and plan.limit > 2**33:
        yield "fp32 runs many times slower than bf16 on present GPUs; --precision bf16"
