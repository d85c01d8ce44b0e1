"""Put a run together: configuration, data, engine, checkpoint, trainer."""

import contextlib
import dataclasses
import socket
from pathlib import Path

import torch

from minimind.checkpoints.formats.init_from import check_starting_weights, set_starting_weights
from minimind.checkpoints.loading import load_checkpoint
from minimind.checkpoints.run_state import TrainState
from minimind.checkpoints.saving import CheckpointSaver
from minimind.config.command_line import CommandLine
from minimind.config.resolve import load_ds_config, resolve_run
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import DTYPE_NAMES
from minimind.data.dataset import TokenDataset
from minimind.data.loader import BatchLoader
from minimind.data.shards import find_split, open_split
from minimind.distributed.collectives import gather_objects, log, on_first_rank
from minimind.distributed.environment import RankEnvironment
from minimind.distributed.launchers.watch import LauncherWatch
from minimind.distributed.out_of_memory import explain_out_of_memory
from minimind.distributed.stop_requests import listen
from minimind.distributed.watchdog import Watchdog
from minimind.errors import UserError
from minimind.model.kernels.matmul import multiplies
from minimind.parallel.deepspeed_check import check_ds_config
from minimind.parallel.engine import build_engine, build_model
from minimind.training.out_of_memory import memory_remedies
from minimind.training.peak_flops import peak_flops
from minimind.training.profiler import StepProfiler
from minimind.training.record.metrics import MetricsLog
from minimind.training.record.wandb import WandbLog, check_wandb
from minimind.training.run_folder import check_run_folder, identify, open_run_folder
from minimind.training.run_lock import RunLock, hold_run_folder
from minimind.training.trainer import Trainer


def prepare(
    command: CommandLine, env: RankEnvironment, device: torch.device
) -> tuple[ResolvedRun, TokenDataset, TokenDataset | None]:
    """Open the shards and settle the configuration; no process group is needed or made.

    Raises:
        UserError: anything wrong with flags, files, shards or the run folder.
    """
    run = command.run
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
    dataset = TokenDataset(train_reader, run.data.seq_len, run.data.document_mask)
    eval_dataset = None
    if eval_reader is not None:
        eval_dataset = TokenDataset(eval_reader, run.data.seq_len, run.data.document_mask, keep_tail=True)
    resolved = resolve_run(
        run,
        load_ds_config(run.train.ds_config),
        dp_size=env.world_size,
        num_samples=len(dataset),
        local_world_size=env.local_world_size,
        device_type=device.type,
        bf16_supported=device.type == "cuda" and torch.cuda.is_bf16_supported(),
    )
    check_ds_config(resolved.ds)
    check_wandb(run.train.wandb_project)
    check_run_folder(resolved, identify(train_reader))
    if run.train.init_from is not None:
        check_starting_weights(run.model, Path(run.train.init_from))
    return resolved, dataset, eval_dataset


def run_rank(
    resolved: ResolvedRun,
    env: RankEnvironment,
    device: torch.device,
    dataset: TokenDataset,
    eval_dataset: TokenDataset | None,
    watchdog: Watchdog,
    launcher: LauncherWatch,
) -> bool:
    """Build and train inside the process group; whether the run reached its last step. Every rank calls this."""
    train, run_dir = resolved.train, Path(resolved.train.run_dir)
    with contextlib.ExitStack() as stack:
        requests = stack.enter_context(listen(run_dir if env.is_first else None))
        launcher.start(requests.launcher_gone)
        stack.callback(launcher.close)
        locks: list[RunLock] = []  # of rank 0
        on_first_rank(lambda: locks.append(stack.enter_context(hold_run_folder(run_dir))))
        notes = check_run_folder(resolved, identify(dataset.reader))
        resume = on_first_rank(lambda: open_run_folder(resolved, dataset.reader, notes))
        loader = BatchLoader(
            dataset,
            train.seed,
            train.micro_batch_size,
            train.global_batch_size,
            env.rank,
            env.world_size,
            pin_memory=device.type == "cuda",
        )
        dtype = getattr(torch, DTYPE_NAMES[train.precision])
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
            state = load_checkpoint(engine, resolved, resume.folder, resume.manifest, resume.portable)
            log(f"resumed from {resume.folder} at step {state.step}")
            if resume.manifest.shard_fingerprint != dataset.reader.fingerprint:
                state = dataclasses.replace(state, data_start_step=state.step)
                log(f"the shards are new: their order begins at step {state.step}")
        loader.first_step = state.data_start_step
        saver = CheckpointSaver(engine, resolved, identify(dataset.reader), asynchronous=train.async_save)
        stack.callback(saver.close)
        metrics = None
        hosts = gather_objects(socket.gethostname())
        if env.is_first:
            wandb = None
            if train.wandb_project is not None:
                wandb = WandbLog(train.wandb_project, run_dir, resolved.run.to_dict())
            metrics = MetricsLog(
                run_dir, state.step, train.steps, tensorboard=train.tensorboard, hosts=hosts, wandb=wandb
            )
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
            requests=requests,
            watchdog=watchdog,
            lock=locks[0] if locks else None,
            state=state,
            flops_per_token=resolved.model.flops_per_token(resolved.data.seq_len),
            peak_flops=peak,
            tokens_per_byte=tokens_per_byte(eval_dataset),
            last_checkpoint=resume.folder if resume is not None else None,
        )
        if train.profile_steps:
            trainer.profiler = StepProfiler(run_dir, env.rank, train.profile_steps, device)
            stack.callback(trainer.profiler.close)
        try:
            # Inside the other one (train.main), so that the run's events get the line too.
            with explain_out_of_memory(device, memory_remedies(resolved), env.rank_label, lambda: watchdog.position):
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
