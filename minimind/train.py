"""Train a model: `python -m minimind.train FLAGS`, on every rank, under any launcher.

Mistakes in flags, files and shards are reported before the process group is made, so that no hardware waits for them.
"""

import dataclasses
import datetime
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from minimind.accelerator import compute_capability, count_devices
from minimind.checkpoints.formats.source import open_source
from minimind.cli import without_local_rank
from minimind.config.command_line import CommandLine, parse_command_line
from minimind.config.deepspeed_file import load_ds_config
from minimind.config.muon import describe_rates
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import TrainConfig
from minimind.data.dataset import Dataset, PackedDataset
from minimind.data.loader import order_windows
from minimind.distributed.collectives import log
from minimind.distributed.cpu_tuning import keep_freed_memory
from minimind.distributed.environment import (
    ALLOCATOR_VARIABLES,
    RankEnvironment,
    expand_segments,
    find_device,
    is_first_rank,
    read_environment,
)
from minimind.distributed.launchers.caches import use_own_caches
from minimind.distributed.launchers.mpi import find_master
from minimind.distributed.launchers.watch import LauncherWatch
from minimind.distributed.out_of_memory import explain_out_of_memory
from minimind.distributed.process_group import connect_store, count_threads, process_group
from minimind.distributed.startup import JOIN_MINUTES, join_ranks, report_startup_error
from minimind.errors import EXIT_STOPPED, UserError, run_main
from minimind.files import raise_open_files
from minimind.parallel.compilation import settle_compilation
from minimind.parallel.op_builds import build_ops
from minimind.reports.plan.memory import estimate_memory
from minimind.reports.plan.micro_batch import fit_micro_batch
from minimind.training.choose_objective import choose_objective
from minimind.training.run_data import RunData, describe_mixture
from minimind.training.run_folder import recorded_micro_batch_size
from minimind.training.setup import memory_remedies, prepare, run_rank


def main(args: Sequence[str] | None = None) -> int:
    """Run one rank from its command line (without the program's name); gives the exit code."""
    args = without_local_rank(args)
    launcher = LauncherWatch()
    env = read_environment()
    command = parse_command_line(args, lambda place: open_source(Path(place), hashes=False).config)
    device = find_device(env, command.run.train.device)
    if device.type == "cpu" and not keep_freed_memory():
        log("malloc is left as it is (another C library, or MALLOC_* is set): freed memory may go back to the system")
    if compute_capability(device) is not None and command.run.model.use_moe:
        expand_segments()
    raise_open_files()
    env = find_master(env)
    use_own_caches(env)
    store = None
    try:
        if command.run.train.micro_batch_size == "auto":
            command, store = settle_micro_batch(command, env, device)
        resolved, data = prepare(command, env, device)
    except UserError as error:
        report_startup_error(env, error)
        raise
    if env.is_first:
        print(describe(resolved, env, device, data), flush=True)
    if command.dry_run:
        if env.is_first:
            print(json.dumps({"run": resolved.run.to_dict(), "deepspeed": resolved.ds}, indent=2))
        return 0
    timeout_minutes = resolved.train.timeout_minutes
    with (
        join_ranks(
            resolved,
            env,
            device,
            data.train.fingerprint,
            functools.partial(data.check_files, env),
            functools.partial(build_ops, resolved),
            store,
        ) as (store, watchdog),
        process_group(env, device, timeout_minutes, store),
        watchdog.report_failure(),
        explain_out_of_memory(device, memory_remedies(resolved), env.rank_label, lambda: watchdog.position),
    ):
        finished = run_rank(resolved, env, device, data, watchdog, launcher)
    return 0 if finished else EXIT_STOPPED


def settle_micro_batch(
    command: CommandLine, env: RankEnvironment, device: torch.device
) -> tuple[CommandLine, torch.distributed.Store | None]:
    """`--micro-batch-size auto` as a number: the one that the run has begun with, or what fits, as rank 0 finds it for
    all; and the store by which it is told. Every rank calls this.

    Raises:
        UserError: nothing fits, or the run is none of which that can be tried.
    """

    def take(micro: int) -> CommandLine:
        train = dataclasses.replace(command.run.train, micro_batch_size=micro)
        return dataclasses.replace(command, run=dataclasses.replace(command.run, train=train))

    check_auto(command.run.train, device)
    resolved, data = prepare(take(1), env, device)
    if (objective := choose_objective(resolved.train, data.train)) != "pretrain":
        raise UserError(f"micro_batch_size: auto tries steps of pretraining, and {objective} holds more; give a number")
    share, recorded = resolved.train.global_batch_size // resolved.dp_size, recorded_micro_batch_size(resolved.train)
    if recorded is not None and share % recorded == 0:
        return take(recorded), None
    store = connect_store(env, JOIN_MINUTES) if env.world_size > 1 else None
    if not env.is_first:
        assert store is not None
        try:
            store.wait(["micro_batch_size"], datetime.timedelta(days=30))
            found = store.get("micro_batch_size").decode()
        except RuntimeError:
            raise UserError("rank 0 has left while it tried micro-batches") from None
        if not found.isdecimal():
            raise UserError(found)
        return take(int(found)), store
    try:
        micro, words = fit_micro_batch(resolved, min(env.local_world_size, count_devices()))
    except UserError as error:
        if store is not None:
            store.set("micro_batch_size", str(error))
        raise
    print(f"micro     {words}", flush=True)
    if store is not None:
        store.set("micro_batch_size", str(micro))
    return take(micro), store


def check_auto(train: TrainConfig, device: torch.device) -> None:
    """Refuse `--micro-batch-size auto` where there is nothing to find, or nothing to keep."""
    if device.type == "cpu":
        raise UserError(
            "micro_batch_size: auto is for GPUs; on a CPU a larger one is no faster: give a number, or none"
        )
    if train.gradient_accumulation_steps is not None:
        raise UserError("gradient_accumulation_steps: with --micro-batch-size auto it follows from it; leave it out")
    if train.global_batch_size is None and load_ds_config(train.ds_config).get("train_batch_size", "auto") == "auto":
        raise UserError("micro_batch_size: auto needs --global-batch-size, which no machine is to decide")


def describe_packing(data: Dataset) -> str:
    """How full windows of whole documents are; nothing for the windows of a stream."""
    if not isinstance(data, PackedDataset):
        return "" if not data.is_packed else ", whole documents"
    return f" ({data.padding:.1%} padding, {data.num_cut:,} of {data.reader.manifest.total_documents:,} documents cut)"


def describe_gpu(resolved: ResolvedRun, env: RankEnvironment) -> str:
    """What is chosen for GPUs, and what the environment says to the libraries below."""
    zero, environment = resolved.zero, os.environ
    allocator = next((environment[name] for name in ALLOCATOR_VARIABLES if name in environment), "as torch has it")
    nccl = [f"{name}={value}" for name, value in sorted(environment.items()) if name.startswith("NCCL_")]
    return (
        f"gpu       figures every {resolved.train.log_every} steps; gradients in buckets of "
        f"{zero.reduce_bucket_size:,}, {'beside' if zero.overlap_comm and zero.stage > 1 else 'after'} the backward; "
        f"TF32 off; allocator {allocator}; "
        f"{count_threads(env)} host threads a rank; {' '.join(nccl) or 'no NCCL_* set'}"
    )


def describe(resolved: ResolvedRun, env: RankEnvironment, device: torch.device, data: RunData) -> str:
    """A run in a few lines: printed at its start, and by --dry-run."""
    train = resolved.train
    tokens_per_step = train.global_batch_size * resolved.data.seq_len
    per_epoch = len(data.train) / train.global_batch_size
    memory = estimate_memory(resolved, device.type)
    order = order_windows(data.train, train.seed, train.global_batch_size)
    lines = [
        f"run       {train.run_dir}",
        f"model     {resolved.describe_size()}",
        f"device    {env.world_size} x {device.type}, {train.precision}, ZeRO stage {resolved.zero.stage}",
        f"data      {data.train.num_tokens:,} tokens, {len(data.train):,} samples of {resolved.data.seq_len}"
        + describe_packing(data.train)
        + (f"; {data.val.num_tokens:,} validation tokens" if data.val else "; no validation split"),
        *describe_mixture(data.train, order, train.global_batch_size, train.steps),
        f"batch     {train.global_batch_size} samples = {train.micro_batch_size} x {train.gradient_accumulation_steps} "
        f"accumulated x {resolved.dp_size} ranks; {tokens_per_step:,} tokens a step"
        + (f"; each sequence on {train.sp_size} ranks" if train.sp_size > 1 else "")
        + (f"; each layer on {train.tp_size} ranks" if train.tp_size > 1 else ""),
        f"length    {train.steps:,} steps, {train.steps / per_epoch:.2f} epochs ({per_epoch:.1f} steps an epoch), "
        f"{train.steps * tokens_per_step:,} tokens",
        f"optimizer {describe_rates(resolved)}",
        "compile   " + settle_compilation(train.compile, device.type)[1],
        "memory    " + memory.summary(),
    ]
    if device.type != "cpu":
        lines.append(describe_gpu(resolved, env))
    lines += [f"note      {note}" for note in resolved.notes]
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main, quiet=not is_first_rank())
