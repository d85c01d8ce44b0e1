"""Entry: `python -m minimind.train FLAGS`, on every rank, under any launcher.

Parse, resolve, open the data, form the process group, build, fit. Everything that a user can get wrong is found before
the process group is made, as far as it can be known then. Holds no logic of its own.
"""

import contextlib
import json
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from minimind.config import resolve as ds_config
from minimind.checkpoints.loading import load
from minimind.checkpoints.saving import CheckpointSaver, TrainState
from minimind.config.run_config import CommandLine, parse_command_line
from minimind.data.dataset import TokenDataset
from minimind.data.loader import BatchLoader
from minimind.data.shards import ShardReader, find_split, open_split
from minimind.distributed.environment import (
    RankEnvironment,
    broadcast_object,
    find_device,
    gather_objects,
    is_first_rank,
    log,
    process_group,
    read_environment,
)
from minimind.config.resolve import Resolved
from minimind.parallel.engine import build_engine, build_model, check_ds_config
from minimind.errors import EXIT_STOPPED, UserError, run_main
from minimind.distributed.cpu_tuning import keep_freed_memory
from minimind.distributed.launchers.watch import LauncherWatch
from minimind.distributed.watchdog import Lifeline
from minimind.distributed.startup import meet, report_absence
from minimind.reports.plan.memory import estimate_memory
from minimind.training.record.metrics import MetricsLog
from minimind.model.kernels.matmul import multiplies
from minimind.distributed.launchers.mpi import find_master
from minimind.distributed.launchers.caches import use_own_caches
from minimind.training.out_of_memory import full_memory_in_words
from minimind.training.peak_flops import peak_flops
from minimind.training.profiler import StepProfiler
from minimind.training.run_folder import check_run_folder, identify, open_run_folder
from minimind.checkpoints.run_state import check_checkpoint_section
from minimind.config.run_length import resolved_steps
from minimind.training.run_lock import RunLock, hold_run_folder
from minimind.distributed.stop_requests import listen
from minimind.checkpoints.formats.init_from import check_starting_weights, set_starting_weights
from minimind.training.trainer import Trainer
from minimind.training.record.wandb import WandbLog, check_wandb

T = TypeVar("T")


def main(args: Sequence[str] | None = None) -> int:
    """Run one rank from its command line (without the program's name); gives the exit code."""
    args = sys.argv[1:] if args is None else args
    # The deepspeed launcher adds --local_rank=N to what the user typed; the environment says the same.
    args = [arg for arg in args if not arg.startswith(("--local_rank=", "--local-rank="))]
    launcher = LauncherWatch()
    env = read_environment()
    command = parse_command_line(args)
    device = find_device(env)
    if device.type == "cpu" and not keep_freed_memory():
        log("malloc is left as it is (another C library, or MALLOC_* is set): what is freed may have to be taken anew")
    env = find_master(env)
    use_own_caches(env)
    try:
        resolved, train_reader, eval_reader = prepare(command, env, device)
    except UserError as error:
        report_absence(env, error)
        raise
    dataset = TokenDataset(train_reader, resolved.run.data.seq_len, resolved.run.data.document_mask)
    eval_dataset = None
    if eval_reader is not None:
        seq_len, document_mask = resolved.run.data.seq_len, resolved.run.data.document_mask
        eval_dataset = TokenDataset(eval_reader, seq_len, document_mask, keep_tail=True)
    resolved = resolved_steps(resolved, len(dataset))
    if env.is_first:
        print(describe(resolved, env, device, dataset, eval_dataset), flush=True)
    if command.dry_run:
        if env.is_first:
            print(json.dumps({"run": resolved.run.to_dict(), "deepspeed": resolved.ds}, indent=2))
        return 0
    timeout_minutes = resolved.run.train.timeout_minutes
    with (
        meet(resolved, env, device, train_reader.fingerprint) as (store, lifeline),
        process_group(env, device, timeout_minutes, store),
        lifeline.reporting(),
        full_memory_in_words(resolved, env, device, lifeline),
    ):
        finished = run_rank(resolved, env, device, dataset, eval_dataset, lifeline, launcher)
    return 0 if finished else EXIT_STOPPED


def prepare(
    command: CommandLine, env: RankEnvironment, device: torch.device
) -> tuple[Resolved, ShardReader, ShardReader | None]:
    """Settle the configuration and open the shards; no process group is needed or made.

    Raises:
        UserError: anything wrong with flags, files, shards or the run folder.
    """
    run = command.run
    resolved = ds_config.resolve(
        run,
        ds_config.load(run.train.ds_config),
        world_size=env.world_size,
        local_world_size=env.local_world_size,
        device_type=device.type,
        bf16_supported=device.type == "cuda" and torch.cuda.is_bf16_supported(),
    )
    check_ds_config(resolved.ds)
    check_checkpoint_section(resolved.ds)
    check_wandb(run.train.wandb_project)
    if run.data.shards is None:
        raise UserError("shards: not given; pass --shards DIR, a folder made by python -m data_prep.tokenize_corpus")
    folder = Path(run.data.shards)
    train_reader = open_split(folder, "train")
    eval_reader = open_split(folder, "val") if find_split(folder, "val") else None
    if eval_reader is None and (run.train.eval_every or run.train.eval_samples):
        raise UserError(f"eval_every: {folder} has no validation split; prepare one, or leave out the --eval flags")
    vocab = train_reader.manifest.vocab_size
    if vocab > run.model.vocab_size:
        raise UserError(
            f"vocab_size: the shards of {folder} have {vocab} tokens and the model only {run.model.vocab_size}; pass "
            f"--vocab-size {vocab}"
        )
    check_run_folder(resolved, identify(train_reader))
    if run.train.init_from is not None:
        check_starting_weights(run.model, Path(run.train.init_from))
    return resolved, train_reader, eval_reader


def run_rank(
    resolved: Resolved,
    env: RankEnvironment,
    device: torch.device,
    dataset: TokenDataset,
    eval_dataset: TokenDataset | None,
    lifeline: Lifeline,
    launcher: LauncherWatch,
) -> bool:
    """Build and train inside the process group; whether the run reached its last step. Every rank calls this."""
    train, run_dir = resolved.run.train, Path(resolved.run.train.run_dir)
    with contextlib.ExitStack() as stack:
        outside = stack.enter_context(listen(run_dir if env.is_first else None))
        launcher.start(outside.abandon)
        stack.callback(launcher.close)
        locks: list[RunLock] = []  # of rank 0
        on_first_rank(lambda: locks.append(stack.enter_context(hold_run_folder(run_dir))))
        notes = check_run_folder(resolved, identify(dataset.reader))
        resume = on_first_rank(lambda: open_run_folder(resolved, dataset.reader, notes))
        loader = BatchLoader(
            dataset,
            train.seed,
            train.micro_batch_size or 1,
            train.global_batch_size or 1,
            env.rank,
            env.world_size,
            pin_memory=device.type == "cuda",
        )
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(train.precision or "", torch.float32)
        peak, source = peak_flops(device, dtype)
        log(f"peak of one device: {peak / 1e12:.3g} TFLOP/s in {train.precision} ({source})")
        if device.type == "cpu" and dtype != torch.float32 and not multiplies(dtype):
            log(f"this processor has no products in {train.precision}: computed in float32 and rounded, at its speed")
        model = build_model(resolved, device)
        if train.init_from is not None and resume is None:
            set_starting_weights(model, Path(train.init_from))
            log(f"weights of {train.init_from}")
        engine = build_engine(resolved, model)
        stack.callback(engine.destroy)
        state = TrainState()
        if resume is not None:
            state = load(engine, resolved, resume.folder, resume.manifest, resume.neutral)
            log(f"resumed from {resume.folder} at step {state.step}")
        saver = CheckpointSaver(engine, resolved, identify(dataset.reader), asynchronous=train.async_save)
        stack.callback(saver.close)
        metrics = None
        hosts = gather_objects(socket.gethostname())
        if env.is_first:
            steps = train.steps or 0
            wandb = None
            if train.wandb_project is not None:
                wandb = WandbLog(train.wandb_project, run_dir, resolved.run.to_dict())
            metrics = MetricsLog(run_dir, state.step, steps, tensorboard=train.tensorboard, hosts=hosts, wandb=wandb)
            stack.callback(metrics.close)
            began = f"resumed from {resume.folder.name}" if resume is not None else "started"
            metrics.log_event("resume" if resume is not None else "start", state.step, began)
        trainer = Trainer(
            resolved=resolved,
            engine=engine,
            loader=loader,
            eval_dataset=eval_dataset,
            device=device,
            metrics=metrics,
            saver=saver,
            outside=outside,
            lifeline=lifeline,
            lock=locks[0] if locks else None,
            state=state,
            flops_per_token=resolved.run.model.flops_per_token(resolved.run.data.seq_len),
            peak_flops=peak,
            tokens_per_byte=tokens_per_byte(eval_dataset),
            last_checkpoint=resume.folder if resume is not None else None,
        )
        if train.profile_steps:
            trainer.profiler = StepProfiler(run_dir, env.rank, train.profile_steps, device)
            stack.callback(trainer.profiler.close)
        try:
            with full_memory_in_words(resolved, env, device, lifeline):  # said in the run's events too
                return trainer.fit()
        except UserError as error:
            if metrics is not None:
                metrics.log_event("fail", trainer.state.step, str(error))
            raise


def tokens_per_byte(eval_dataset: TokenDataset | None) -> float:
    """Tokens of the validation split for one UTF-8 byte of its text: turns loss a token into loss a byte."""
    if eval_dataset is None:
        return 1.0
    manifest = eval_dataset.reader.manifest
    return manifest.total_tokens / max(1, manifest.total_bytes)


def on_first_rank(work: Callable[[], T]) -> T:
    """Do `work` on rank 0 and give its result, or its `UserError`, to every rank. Every rank calls this."""
    result: tuple[str, Any] | None = None
    if torch.distributed.get_rank() == 0:
        try:
            result = ("done", work())
        except UserError as error:
            result = ("failed", str(error))
    kind, value = broadcast_object(result)
    if kind == "failed":
        raise UserError(value)
    return value


def describe(
    resolved: Resolved, env: RankEnvironment, device: torch.device, dataset: TokenDataset, eval_dataset: Any
) -> str:
    """What a run is, in a few lines: printed at its start, and by --dry-run."""
    run, train, config = resolved.run, resolved.run.train, resolved.run.model
    assert train.global_batch_size is not None and train.micro_batch_size is not None and train.steps is not None
    tokens_per_step = train.global_batch_size * run.data.seq_len
    per_epoch = len(dataset) / train.global_batch_size
    memory = estimate_memory(resolved, env.world_size, device.type)
    lines = [
        f"run       {train.run_dir}",
        f"model     {config.num_params():,} parameters ({config.num_active_params():,} active a token)",
        f"device    {env.world_size} x {device.type}, {train.precision}, ZeRO stage {resolved.zero_stage}",
        f"data      {dataset.reader.num_tokens:,} tokens, {len(dataset):,} samples of {run.data.seq_len}"
        + (f"; {eval_dataset.reader.num_tokens:,} validation tokens" if eval_dataset else "; no validation split"),
        f"batch     {train.global_batch_size} samples = {train.micro_batch_size} x {train.gradient_accumulation_steps} "
        f"accumulated x {env.world_size} ranks; {tokens_per_step:,} tokens a step",
        f"length    {train.steps:,} steps, {train.steps / per_epoch:.2f} epochs ({per_epoch:.1f} steps an epoch), "
        f"{train.steps * tokens_per_step:,} tokens",
        "memory    " + memory.summary(),
    ]
    lines += [f"note      {note}" for note in resolved.notes]
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main, quiet=not is_first_rank())
