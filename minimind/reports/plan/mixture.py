"""Which mixture of data, sequence and tensor parallelism, ZeRO stage and recomputation trains a run fastest on the
planned GPUs: every one whose memory fits, ordered by the time of a step.

The time is arithmetic (operations, bytes, the rates below) and nothing overlaps in it: it orders mixtures and promises
nothing.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from minimind.config.deepspeed_keys import with_stage, without_batch, zero_stage
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import RunConfig
from minimind.errors import UserError
from minimind.reports.plan.activations import params_of_rank, precision_of
from minimind.reports.plan.memory import MemoryEstimate, estimate_memory, largest_micro_batch
from minimind.reports.plan.planned_run import VARIANTS, PlanOptions, column_name, device_limit, resolve_for
from minimind.reports.plan.table import planned_speed
from minimind.units import format_bytes, format_table

NODE_BANDWIDTH, NETWORK_BANDWIDTH, HOST_BANDWIDTH = 300e9, 40e9, 25e9
"""Bytes a second of one GPU: to others of its node (NVLink), to another node (400 Gb/s), to its host (PCIe 4)."""
ASSUMED_SPEED = 0.35 * 989e12
"""Operations a second of one GPU, where it is not known."""
USUAL_BATCH_TOKENS = 2**19
"""Tokens of a step where no batch is given: what GPT-3's models of up to 1.3 billion took (arXiv 2005.14165)."""
SHOWN = 5


@dataclass(frozen=True)
class Mixture:
    """One way to share the work."""

    resolved: ResolvedRun
    memory: MemoryEstimate
    seconds: float
    """Of a token of a step, on all planned GPUs together."""

    @property
    def split(self) -> tuple[int, int]:
        """Ranks that share each sequence, and ranks that share the matrices of each layer."""
        return self.resolved.train.sp_size, self.resolved.train.tp_size

    @property
    def column(self) -> str:
        """The ZeRO stage and what is offloaded, in words."""
        return column_name(self.resolved.zero.stage, self.resolved.zero.offloaded)


def show_mixtures(run: RunConfig, ds: dict[str, Any], options: PlanOptions) -> tuple[str, bool]:
    """The fastest mixtures that fit, one of each split, as a table, with the flags of the first; and whether there is
    one."""
    limit, ranks = device_limit(options), options.num_gpus * options.num_nodes
    best: dict[tuple[int, int], Mixture] = {}
    for mixture in sorted(find_mixtures(run, ds, options, limit), key=lambda one: (one.seconds, one.memory.total)):
        best.setdefault(mixture.split, mixture)
    found = list(best.values())
    lines = [
        f"model     {run.model.num_params():,} parameters, {run.data.seq_len:,} tokens a sequence",
        f"ranks     {ranks} on {options.num_nodes} node{'s' if options.num_nodes > 1 else ''}, "
        f"{format_bytes(limit)} a rank for tensors",
        f"speed     {_describe_speed(run, options)}, nothing overlapped",
    ]
    if not found:
        lines.append(
            "nothing   fits, however ranks share sequences and layers, in any ZeRO stage, offloaded or not: take more "
            "GPUs or a smaller model"
        )
        return "\n".join(lines), False
    rows = [["dp", "sp", "tp", "ZeRO", "recomputes", "batch = micro x accumulated x dp", "a rank", "tokens/s"]]
    for mixture in found[:SHOWN]:
        train = mixture.resolved.train
        batch = f"{train.global_batch_size} = {train.micro_batch_size} x {train.gradient_accumulation_steps}"
        rows.append([
            str(mixture.resolved.dp_size), *map(str, mixture.split),
            mixture.column.removeprefix("ZeRO "), "yes" if train.activation_checkpointing else "no",
            f"{batch} x {mixture.resolved.dp_size}", format_bytes(mixture.memory.total), f"{1 / mixture.seconds:,.0f}",
        ])  # fmt: skip
    lines += ["", format_table(rows, ">>>>>>>>"), "", f"flags     {flags_of(found[0], ds)}"]
    return "\n".join(lines), True


def _describe_speed(run: RunConfig, options: PlanOptions) -> str:
    planned = planned_speed(options, half=run.train.precision != "fp32")
    gpu = planned[1] if planned is not None else f"{ASSUMED_SPEED / 1e12:.0f} TFLOP/s a GPU (--gpu says another)"
    node, network = NODE_BANDWIDTH / 1e9, NETWORK_BANDWIDTH / 1e9
    return f"{gpu}, {node:.0f} GB/s inside a node, {network:.0f} GB/s between nodes"


def flags_of(mixture: Mixture, ds: dict[str, Any]) -> str:
    """What to type for this mixture, beside the run's other flags; `ds`: the run's own DeepSpeed JSON."""
    train, zero = mixture.resolved.train, mixture.resolved.zero
    words = [f"--sp-size {train.sp_size}" if train.sp_size > 1 else ""]
    words += [f"--tp-size {train.tp_size}" if train.tp_size > 1 else ""]
    words += [f"--micro-batch-size {train.micro_batch_size} --global-batch-size {train.global_batch_size}"]
    words += ["--activation-checkpointing"] if train.activation_checkpointing else []
    if train.ds_config is None or zero.stage != zero_stage(ds) or zero.offloaded:
        words.append(f"--ds-config ds_configs/zero{zero.stage}{'_offload' * bool(zero.offloaded)}.json")
    return " ".join(filter(None, words))


def find_mixtures(run: RunConfig, ds: dict[str, Any], options: PlanOptions, limit: int) -> Iterator[Mixture]:
    """Every mixture that fits, with the largest micro-batch; offload only where nothing fits without.

    Args:
        limit: bytes of a rank.
    """
    found: list[Mixture] = []
    for offloads in (False, True):
        for split in splits(options):
            for stage, offloaded in VARIANTS:
                if stage and bool(offloaded) == offloads:  # stage 1 sends what stage 0 sends, and holds less
                    for recomputes in (False, True):
                        mixture = try_mixture(run, with_stage(ds, stage, offloaded), options, split, recomputes, limit)
                        found += [mixture] if mixture is not None else []
        if found:
            break
    return iter(found)


def try_mixture(
    run: RunConfig, ds: dict[str, Any], options: PlanOptions, split: tuple[int, int], recomputes: bool, limit: int
) -> Mixture | None:
    """This mixture with the largest micro-batch that fits and divides the batch; None: not one sequence fits, or the
    run cannot be resolved so."""
    ranks = options.num_gpus * options.num_nodes
    sp_size, tp_size = split
    dp_size = ranks // (sp_size * tp_size)
    theirs = ds.get("train_batch_size")
    together = run.train.global_batch_size or (theirs if isinstance(theirs, int) else None)
    if together is None:
        together = dp_size * max(1, round(USUAL_BATCH_TOKENS / run.data.seq_len / dp_size))
    if together % dp_size:
        return None
    share = together // dp_size

    def resolve(micro: int) -> ResolvedRun:
        train = dataclasses.replace(
            run.train,
            micro_batch_size=micro,
            global_batch_size=together,
            gradient_accumulation_steps=None,
            activation_checkpointing=recomputes,
            sp_size=sp_size,
            tp_size=tp_size,
        )
        return resolve_for(dataclasses.replace(run, train=train), without_batch(ds)[0], options)

    try:
        largest = largest_micro_batch(resolve(1), limit, options.device)
        if not largest:
            return None
        micro = max(size for size in range(1, min(share, largest) + 1) if share % size == 0)
        resolved = resolve(micro)
    except UserError:  # the run cannot be split so, or not in this stage
        return None
    memory = estimate_memory(resolved, options.device)
    return Mixture(resolved, memory, seconds_per_token(resolved, options))


def splits(options: PlanOptions) -> list[tuple[int, int]]:
    """(sp_size, tp_size) that divide the ranks, layers inside a node; resolving tells whether a run can be split so."""
    ranks = options.num_gpus * options.num_nodes
    return [
        (sp_size, tp_size)
        for tp_size in range(1, options.num_gpus + 1)
        if options.num_gpus % tp_size == 0
        for sp_size in range(1, ranks // tp_size + 1)
        if ranks // tp_size % sp_size == 0
    ]


def seconds_per_token(resolved: ResolvedRun, options: PlanOptions) -> float:
    """Time of a step, on all GPUs together, divided by its tokens: products, exchanges around attention, sums inside
    the layers, ZeRO's reductions and gathers, offload."""
    model, train, zero = resolved.model, resolved.train, resolved.zero
    compute, _ = precision_of(resolved)
    ranks = options.num_gpus * options.num_nodes
    speed = planned_speed(options, half=compute == 2)
    each = speed[0] / ranks if speed is not None else ASSUMED_SPEED
    tokens = train.global_batch_size * resolved.data.seq_len // (resolved.dp_size * train.sp_size)  # of a rank's step
    passes = 3 if train.activation_checkpointing else 2  # forward (again) and backward
    total = tokens * resolved.flops_per_token / train.tp_size * (4 / 3 if passes == 3 else 1) / each

    def exchange(num_bytes: float, size: int, span: int) -> float:
        """Seconds for a rank to send its bytes to the others of a group of `size` in `span` neighbouring ranks."""
        bandwidth = NODE_BANDWIDTH if span <= options.num_gpus else NETWORK_BANDWIDTH
        return num_bytes * (size - 1) / size / bandwidth

    query, key = model.num_attention_heads * model.head_size, model.num_key_value_heads * model.head_size
    repeats = train.sp_size // math.gcd(model.num_key_value_heads // train.tp_size, train.sp_size)
    heads = (2 * query + 2 * key * repeats) // train.tp_size * compute
    layers = model.num_hidden_layers * passes * tokens
    total += exchange(layers * heads, train.sp_size, train.sp_size * train.tp_size)
    total += exchange(layers * 2 * 2 * model.hidden_size * compute, train.tp_size, train.tp_size)
    # Stages 2 and 3 reduce each micro-batch's gradients; stage 3 gathers the weights for forward and backward too.
    size, weights = resolved.dp_size * train.sp_size, params_of_rank(model, train.tp_size) * zero.weight_bytes
    reductions = train.gradient_accumulation_steps if zero.stage >= 2 else 1
    rounds = reductions + (2 * reductions if zero.stage == 3 else 1)
    total += exchange(rounds * weights, size, ranks)
    if zero.offloaded:  # gradients to the host, new weights back; Adam there reads and writes 12 bytes of each
        total += params_of_rank(model, train.tp_size) / size * (2 * zero.weight_bytes + 24) / HOST_BANDWIDTH
    if "param" in zero.offloaded:
        total += 2 * reductions * weights / HOST_BANDWIDTH
    return total / (train.global_batch_size * resolved.data.seq_len)
