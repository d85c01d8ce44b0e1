"""Before a run: will it fit, how long will it take, what will it cost. `python -m minimind.plan --model NAME ...`

Takes every flag of training beside its own, resolves the run as training would for the ranks that are planned, and
prints arithmetic. Touches no device, unless `--find-micro-batch` asks for real steps.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

from minimind.config import resolve as ds_config
from minimind.reports.plan.advice import Planned, advise
from minimind.config.run_config import DataConfig, RunConfig, Selection, TrainConfig, check_run, read_selection
from minimind.errors import run_main
from minimind.cli import parse_flags
from minimind.reports.plan.memory import ITEMS, MemoryEstimate, format_bytes
from minimind.reports.plan.micro_batch import find_micro_batch
from minimind.model.config import ModelConfig
from minimind.training.peak_flops import data_sheet_peak
from minimind.reports.plan.planned_run import (
    USABLE,
    VARIANTS,
    PlanOptions,
    check_options,
    configured_column,
    make_plan,
    parse_bytes,
)
from minimind.reports.plan.cost import RunCost, checkpoint_bytes, estimate_cost, format_hours, kept_checkpoints

PROGRAM = "python -m minimind.plan"
ASSUMED_MFU = 0.35


@dataclass(frozen=True)
class _Flags:
    """Plan a training run: memory in every ZeRO stage, the largest micro-batch, time, cost, disk, advice."""

    plan: Annotated[PlanOptions, tyro.conf.arg(name="")]
    selection: Annotated[Selection, tyro.conf.arg(name="")]
    data: Annotated[DataConfig, tyro.conf.arg(name="")]
    train: Annotated[TrainConfig, tyro.conf.arg(name="")]
    fields: Annotated[ModelConfig, tyro.conf.arg(name="")]


def main(args: Sequence[str] | None = None) -> int:
    """Print the plan; gives the exit code: 1 where the run does not fit."""
    args = sys.argv[1:] if args is None else args
    selection, base = read_selection(args, PROGRAM)
    default = _Flags(PlanOptions(), selection, base.data, base.train, base.model)
    flags = parse_flags(_Flags, args, default=default, prog=PROGRAM)
    options = check_options(flags.plan)
    run = RunConfig(model=flags.fields, data=flags.data, train=flags.train)
    check_run(run)
    ds = ds_config.load(run.train.ds_config)
    if options.find_micro_batch:
        limit = parse_bytes(options.gpu_memory, "gpu_memory") if options.gpu_memory else None
        find_micro_batch(run, ds, limit, num_ranks=options.num_gpus)
        return 0
    plan = make_plan(run, ds, options)
    print(show_plan(plan, options))
    return 0 if plan.memory.total <= plan.limit else 1


def show_plan(plan: Planned, options: PlanOptions) -> str:
    """The plan as text for a terminal."""
    run, train = plan.resolved.run, plan.resolved.run.train
    gpus = f"{plan.world_size} ranks on {plan.num_nodes} node{'s' if plan.num_nodes > 1 else ''}"
    assumed = " (assumed; --gpu-memory says another)" if _is_assumed(options) else ""
    lines = [
        f"model     {run.model.num_params():,} parameters ({run.model.num_active_params():,} active a token)",
        f"ranks     {gpus}, {options.device}, {train.precision}, ZeRO stage {plan.resolved.zero_stage}",
        f"batch     {train.global_batch_size:,} sequences of {run.data.seq_len:,} tokens = {train.micro_batch_size} x "
        f"{train.gradient_accumulation_steps} accumulated x {plan.world_size} ranks"
        + (", activation checkpointing" if train.activation_checkpointing else ""),
        f"limit     {format_bytes(plan.limit)} a rank for tensors, {USABLE:.0%} of the device{assumed}",
        "",
        *memory_table(plan),
        "",
    ]
    cost = _cost(plan, options)
    if cost is not None:
        lines.append(
            f"time      {format_hours(cost.hours)}: {plan.tokens:,} tokens, {plan.steps:,} steps, {cost.basis}"
        )
        price = "" if cost.price is None else f", {cost.price:,.2f} at {options.price:g} a GPU-hour"
        lines.append(f"cost      {cost.gpu_hours:,.1f} GPU-hours{price}")
    elif plan.steps is not None:
        lines.append("time      unknown: give --gpu NAME, --mfu with it, or --tokens-per-second")
    else:
        lines.append("time      unknown: give --tokens or --steps")
    size, kept = checkpoint_bytes(plan.resolved), kept_checkpoints(train, plan.steps)
    lines.append(
        f"disk      {format_bytes(size)} a checkpoint; up to {format_bytes(size * (kept + 1))} for {kept} kept and one "
        "being written"
    )
    lines += [f"warning   {line}" for line in advise(plan)]
    lines += [f"note      {note}" for note in plan.resolved.notes]
    return "\n".join(lines)


def _is_assumed(options: PlanOptions) -> bool:
    return options.gpu_memory is None and not torch.cuda.is_available()


def _cost(plan: Planned, options: PlanOptions) -> RunCost | None:
    name = options.gpu
    if name is None and torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
    peak = data_sheet_peak(name, half=plan.resolved.run.train.precision != "fp32") if name else None
    mfu = options.mfu if options.mfu is not None else ASSUMED_MFU
    return estimate_cost(plan, options.tokens_per_second, mfu, peak, options.price)


def memory_table(plan: Planned) -> list[str]:
    """Lines of a table: an item a row, a ZeRO stage a column; the configured one is marked."""
    marked = configured_column(plan)
    columns: dict[str, MemoryEstimate | None] = {name: plan.without.get(name) for name, _, _ in VARIANTS}
    if marked is not None:
        columns[marked] = plan.memory
    head = [f"{name}*" if name == marked else name for name in columns]
    rows = [("a rank", head)]
    items = [*ITEMS, *(["experts"] if plan.resolved.run.model.use_moe else [])]
    labels = {"experts": "of which experts", "update": "update (temporary)", "gathered": "gathered weights"}
    for item in items:
        cells = [_cell(None if memory is None else getattr(memory, item)) for memory in columns.values()]
        rows.append((labels.get(item, item), cells))
    totals = [None if memory is None else memory.total for memory in columns.values()]
    rows.append(("peak of a step", [_cell(total) for total in totals]))
    rows.append(("host", [_cell(None if memory is None else memory.host) for memory in columns.values()]))
    rows.append(("fits", ["-" if total is None else "yes" if total <= plan.limit else "no" for total in totals]))
    largest = {**plan.largest, **({marked: plan.largest_micro_batch} if marked else {})}
    rows.append(("largest micro-batch", [str(largest.get(name, "-")) for name in columns]))
    return [f"{label:<20}" + "".join(f"{cell:>12}" for cell in cells) for label, cells in rows]


def _cell(count: int | None) -> str:
    return "-" if count is None else "0" if not count else format_bytes(count)


if __name__ == "__main__":
    run_main(main)
