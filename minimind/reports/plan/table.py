"""A planned run as text: memory, time and cost."""

import torch

from minimind.reports.plan.advice import advise
from minimind.reports.plan.cost import RunCost, estimate_cost, kept_checkpoints
from minimind.reports.plan.memory import ITEMS, MemoryEstimate
from minimind.reports.plan.planned_run import USABLE, VARIANTS, PlannedRun, PlanOptions, configured_column
from minimind.training.peak_flops import data_sheet_peak
from minimind.units import format_bytes, format_hours, format_table

ASSUMED_MFU = 0.35


def show_plan(plan: PlannedRun, options: PlanOptions) -> str:
    """The plan as text for a terminal."""
    run, train = plan.resolved, plan.resolved.train
    gpus = f"{plan.world_size} ranks on {plan.num_nodes} node{'s' if plan.num_nodes > 1 else ''}"
    assumed = " (assumed; --gpu-memory says another)" if _is_assumed(options) else ""
    lines = [
        f"model     {run.model.num_params():,} parameters ({run.model.num_active_params():,} active a token)",
        f"ranks     {gpus}, {options.device}, {train.precision}, ZeRO stage {plan.resolved.zero.stage}",
        f"batch     {train.global_batch_size:,} sequences of {run.data.seq_len:,} tokens = {train.micro_batch_size} x "
        f"{train.gradient_accumulation_steps} accumulated x {plan.world_size} ranks"
        + (", activation checkpointing" if train.activation_checkpointing else ""),
        f"limit     {format_bytes(plan.limit)} a rank for tensors, {USABLE:.0%} of the device{assumed}",
        "",
        memory_table(plan),
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
    size, kept = plan.resolved.checkpoint_bytes, kept_checkpoints(train, plan.steps)
    lines.append(
        f"disk      {format_bytes(size)} a checkpoint; up to {format_bytes(size * (kept + 1))} for {kept} kept and one "
        "being written"
    )
    lines += [f"warning   {line}" for line in advise(plan)]
    lines += [f"note      {note}" for note in plan.resolved.notes]
    return "\n".join(lines)


def _is_assumed(options: PlanOptions) -> bool:
    return options.gpu_memory is None and not torch.cuda.is_available()


def _cost(plan: PlannedRun, options: PlanOptions) -> RunCost | None:
    name = options.gpu
    if name is None and torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
    peak = data_sheet_peak(name, half=plan.resolved.train.precision != "fp32") if name else None
    mfu = options.mfu if options.mfu is not None else ASSUMED_MFU
    return estimate_cost(plan, options.tokens_per_second, mfu, peak, options.price)


def memory_table(plan: PlannedRun) -> str:
    """An item a row, a ZeRO stage a column; the configured one is marked."""
    marked = configured_column(plan)
    columns: dict[str, MemoryEstimate | None] = {name: plan.without.get(name) for name, _, _ in VARIANTS}
    if marked is not None:
        columns[marked] = plan.memory
    head = [f"{name}*" if name == marked else name for name in columns]
    rows = [("a rank", head)]
    items = [*ITEMS, *(["experts"] if plan.resolved.model.use_moe else [])]
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
    return format_table([[label, *cells] for label, cells in rows], "<>")


def _cell(count: int | None) -> str:
    return "-" if count is None else "0" if not count else format_bytes(count)
