"""A planned run as text: memory, time and cost."""

from minimind.accelerator import accelerator_type, default_device, device_name
from minimind.config.run_config import TrainConfig
from minimind.data.loader import order_windows
from minimind.data.mixture import read_mixture
from minimind.reports.plan.advice import advise
from minimind.reports.plan.memory import ITEMS
from minimind.reports.plan.planned_run import USABLE, PlannedRun, PlanOptions
from minimind.training.peak_flops import data_sheet_peak
from minimind.training.run_data import check_length, describe_mixture, open_data
from minimind.units import format_bytes, format_hours, format_table

ASSUMED_MFU = 0.35
_LABELS = {"experts": "of which experts", "update": "update (temporary)", "gathered": "gathered weights",
           "total": "peak of a step"}  # fmt: skip


def show_plan(plan: PlannedRun) -> str:
    """The plan as text for a terminal."""
    run, train, options = plan.resolved, plan.resolved.train, plan.options
    gpus = f"{plan.world_size} ranks on {options.num_nodes} node{'s' if options.num_nodes > 1 else ''}"
    groups = "ranks" if run.dp_size == plan.world_size else "groups of ranks"
    is_assumed = options.gpu_memory is None and accelerator_type() is None
    size, kept = run.checkpoint_bytes, kept_checkpoints(train, plan.steps)
    lines = [
        f"model     {run.describe_size()}",
        f"ranks     {gpus}, {options.device}, {train.precision}, ZeRO stage {run.zero.stage}"
        + (f", sp {train.sp_size} x tp {train.tp_size}" if run.dp_size < plan.world_size else ""),
        f"batch     {train.global_batch_size:,} sequences of {run.data.seq_len:,} tokens = {train.micro_batch_size} x "
        f"{train.gradient_accumulation_steps} accumulated x {run.dp_size} {groups}"
        + (", activation checkpointing" if train.activation_checkpointing else ""),
        f"limit     {format_bytes(plan.limit)} a rank for tensors, {USABLE:.0%} of the device"
        + (" (assumed; --gpu-memory says another)" if is_assumed else ""),
        "",
        memory_table(plan),
        "",
        *time_and_cost(plan),
        *data_of(plan),
        f"disk      {format_bytes(size)} a checkpoint; up to {format_bytes(size * (kept + 1))} for {kept} kept and one "
        "being written",
        *(f"warning   {line}" for line in advise(plan)),
        *(f"note      {note}" for note in run.notes),
    ]
    return "\n".join(lines)


def time_and_cost(plan: PlannedRun) -> list[str]:
    """How long all tokens take, and what they cost; or what to give to know it."""
    options, ranks, tokens = plan.options, plan.world_size, plan.tokens
    if tokens is None:
        return ["time      unknown: give --tokens or --steps"]
    speed, basis = options.tokens_per_second, ""
    if speed is None:
        planned = planned_speed(options, half=plan.resolved.train.precision != "fp32")
        if planned is None:
            return ["time      unknown: give --gpu NAME, --mfu with it, or --tokens-per-second"]
        speed, basis = planned[0] / plan.resolved.flops_per_token, f" = {planned[1]}"
    hours = tokens / speed / 3600
    price = "" if options.price is None else f", {hours * ranks * options.price:,.2f} at {options.price:g} a GPU-hour"
    return [
        f"time      {format_hours(hours)}: {tokens:,} tokens, {plan.steps:,} steps, at {speed:,.0f} tokens/s{basis}",
        f"cost      {hours * ranks:,.1f} GPU-hours{price}",
    ]


def data_of(plan: PlannedRun) -> list[str]:
    """What each source of a mixture gives to the run, where the shards are there to see."""
    run = plan.resolved.run
    if plan.steps is None or run.data.shards is None or read_mixture(run.data.shards) is None:
        return []
    train, dataset = plan.resolved.train, open_data(run, check=False).train
    order = order_windows(dataset, train.seed, train.global_batch_size)
    check_length(order, plan.steps, train.global_batch_size)
    return describe_mixture(dataset, order, train.global_batch_size, plan.steps)


def planned_speed(options: PlanOptions, *, half: bool) -> tuple[float, str] | None:
    """Operations a second of all planned GPUs together, and in words; None: the GPU is not known.

    Args:
        half: bf16 and fp16, else fp32.
    """
    name = options.gpu or (device_name(default_device()) if accelerator_type() else None)
    peak = data_sheet_peak(name, half=half) if name else None
    if peak is None:
        return None
    mfu, ranks = ASSUMED_MFU if options.mfu is None else options.mfu, options.num_gpus * options.num_nodes
    return mfu * peak[0] * ranks, f"{mfu:.0%} of {ranks} x {peak[1]}"


def kept_checkpoints(train: TrainConfig, steps: int | None) -> int:
    """The most checkpoints that lie on the disk at once, of those that retention keeps."""
    if steps is None or not train.save_every:
        return max(1, train.keep_last) if train.save_every else 1
    saved = -(-steps // train.save_every)
    if not train.keep_last:
        return saved
    milestones = steps // train.keep_every if train.keep_every else 0
    return min(saved, train.keep_last + milestones + train.keep_best)


def memory_table(plan: PlannedRun) -> str:
    """An item a row, a ZeRO stage a column; the configured one is marked."""
    columns = plan.columns
    rows = [["a rank", *(f"{name}*" if name == plan.configured else name for name in columns)]]
    experts = ["experts"] if plan.resolved.model.use_moe else []
    for item in (*ITEMS, *experts, "total", "host"):
        sizes = [column and getattr(column.memory, item) for column in columns.values()]
        cells = ["-" if size is None else format_bytes(size) if size else "0" for size in sizes]
        rows.append([_LABELS.get(item, item), *cells])
    fits = {True: "yes", False: "no"}
    rows.append(["fits", *("-" if column is None else fits[name in plan.fitting] for name, column in columns.items())])
    rows.append(
        ["largest micro-batch", *("-" if column is None else str(column.largest) for column in columns.values())]
    )
    return format_table(rows, "<>")
