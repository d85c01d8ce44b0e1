"""How a run is put together: open the data, take the run folder, build the engine, load, fit."""

import contextlib
import dataclasses
import socket
from pathlib import Path

import deepspeed
import torch

from minimind.accelerator import compute_capability, computes_bf16, device_name, has_streams
from minimind.checkpoints.formats.init_from import check_init_checkpoint, describe_changes, load_init_checkpoint
from minimind.checkpoints.loading import load_checkpoint
from minimind.checkpoints.manifest import TrainState
from minimind.checkpoints.run_state import DataFingerprint
from minimind.checkpoints.saving import CheckpointSaver
from minimind.config.command_line import CommandLine
from minimind.config.deepspeed_file import load_ds_config
from minimind.config.resolve import resolve_run
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import DTYPE_NAMES
from minimind.data.dataset import Dataset, SequencePart
from minimind.data.loader import BatchLoader, order_windows
from minimind.distributed.collectives import gather_objects, lead_from_first_rank, log
from minimind.distributed.environment import RankEnvironment
from minimind.distributed.launchers.watch import LauncherWatch
from minimind.distributed.out_of_memory import explain_out_of_memory
from minimind.distributed.watchdog import Watchdog
from minimind.errors import UserError
from minimind.model.kernels.attention import has_varlen_attention
from minimind.model.kernels.matmul import has_fast_matmul
from minimind.parallel.compilation import check_expert_kernels, settle_compilation
from minimind.parallel.deepspeed_check import check_ds_config, check_ops
from minimind.parallel.engine import build_engine, build_model
from minimind.parallel.experts import find_grouped_product
from minimind.parallel.mesh import Mesh, make_mesh
from minimind.training.choose_objective import check_objective, find_start, make_objective
from minimind.training.control import hold_run
from minimind.training.peak_flops import peak_flops
from minimind.training.profiler import StepProfiler
from minimind.training.record.metrics import NullRecord, RunRecord
from minimind.training.record.wandb import WandbLog, check_wandb
from minimind.training.run_data import RunData, check_length, describe_mixture, open_data
from minimind.training.run_folder import (
    Resume,
    check_run_folder,
    identify,
    open_run_folder,
    settle_aux_loss_scope,
    settle_optimizer,
)
from minimind.training.trainer import Trainer


def prepare(command: CommandLine, env: RankEnvironment, device: torch.device) -> tuple[ResolvedRun, RunData]:
    """Open the data and resolve the configuration; no process group is needed or made.

    Raises:
        UserError: anything wrong with flags, files, shards or the run folder.
    """
    run = settle_optimizer(settle_aux_loss_scope(command.run))
    data = open_data(run, check=env.world_size == 1)
    if data.train.is_packed:
        packed = dataclasses.replace(run.data, packing="whole-documents", document_mask=True)
        run = dataclasses.replace(run, data=packed)
    resolved = resolve_run(
        run,
        load_ds_config(run.train.ds_config),
        world_size=env.world_size,
        num_samples=len(data.train),
        local_world_size=env.local_world_size,
        device_type=device.type,
        bf16_supported=computes_bf16(device),
    )
    check_ds_config(resolved.ds)
    check_ops(resolved.ds)
    settle_compilation(run.train.compile, device.type)
    check_expert_kernels(resolved, device.type)
    check_wandb(run.train.wandb_project)
    train = resolved.train
    if not train.allow_data_change:  # with it, what was read of each source is known when a checkpoint is
        order = order_windows(data.train, train.seed, train.global_batch_size)
        check_length(order, train.steps, train.global_batch_size)
    check_run_folder(resolved, identify(data.train))
    if run.train.keeps_frozen and run.train.init_from is None:
        flag = "lora_rank" if run.train.lora_rank else "freeze"
        raise UserError(f"{flag}: frozen weights are those of a trained model; give it by --init-from")
    check_objective(run, data.train, resolved.train.sp_size, resolved.train.tp_size)
    if run.train.init_from is not None:
        trained = resolved.trained if run.train.keeps_frozen else None
        source = check_init_checkpoint(run.model, Path(run.train.init_from), trained)
        if (changes := describe_changes(source.config, run.model)) is not None:
            resolved = dataclasses.replace(resolved, notes=(*resolved.notes, changes))
    return resolved, data


def run_rank(
    resolved: ResolvedRun,
    env: RankEnvironment,
    device: torch.device,
    data: RunData,
    watchdog: Watchdog,
    launcher: LauncherWatch,
) -> bool:
    """Put the run together and train, inside the process group; whether it reached its last step. Every rank calls
    this."""
    train, run_dir, corpus = resolved.train, Path(resolved.train.run_dir), identify(data.train)
    with contextlib.ExitStack() as stack:
        control = stack.enter_context(hold_run(run_dir, watchdog, launcher, is_first=env.is_first))
        notes = check_run_folder(resolved, corpus)  # again: another job may have begun a run there meanwhile
        if train.keeps_frozen:
            resolved = dataclasses.replace(resolved, base=find_start(resolved))
        resume = lead_from_first_rank(
            lambda share: open_run_folder(resolved, data.train, notes, share),
            lambda: watchdog.report(None, "verifying checkpoints"),
        )
        watchdog.report(None, "building the model, loading its state")
        peak = describe_device(device, resolved)
        mesh = make_mesh(resolved)
        model = build_model(resolved, device, mesh)
        if train.init_from is not None and (resume is None or train.keeps_frozen):
            start = Path((resolved.base or find_start(resolved)).path)
            num_new = load_init_checkpoint(model, start)
            new = f"; new tokens: {num_new}, which start at the mean of the others" if num_new else ""
            log(f"weights of {start}{new}")
        engine = build_engine(resolved, model, mesh)
        stack.callback(engine.destroy)
        state = load_state(engine, resolved, resume, corpus)
        loader = make_loader(resolved, data.train, mesh, state, pin_memory=has_streams(device))
        objective = make_objective(resolved, data.train, device, loader, mesh)
        stack.callback(objective.close)
        splits = {"train": data.train} if data.val is None else {"train": data.train, "val": data.val}
        objective.prepare(engine, splits, run_dir, is_new=resume is None)
        saver = CheckpointSaver(engine, resolved, corpus, asynchronous=train.async_save)
        stack.callback(saver.close)
        record = open_record(resolved, env, state, resume, peak)
        stack.callback(record.close)
        profiler = StepProfiler(run_dir, env.rank, train.profile_steps, device)
        stack.callback(profiler.close)
        trainer = Trainer(
            resolved=resolved,
            mesh=mesh,
            engine=engine,
            objective=objective,
            loader=loader,
            val=data.val,
            saver=saver,
            record=record,
            control=control,
            profiler=profiler,
            state=state,
            last_checkpoint=resume.folder if resume is not None else None,
            proven=resume is not None and not resume.is_resharded,
        )
        try:
            # Inside the one of train.main, so that the run's events get the line too.
            remedies = memory_remedies(resolved)
            with explain_out_of_memory(device, remedies, env.rank_label, lambda: watchdog.position):
                return trainer.fit()
        except UserError as error:
            record.log_event("fail", trainer.state.step, str(error))
            raise


def describe_device(device: torch.device, resolved: ResolvedRun) -> float:
    """Log the peak of one device in the run's precision, in FLOP/s, and give it."""
    precision = resolved.train.precision
    dtype = getattr(torch, DTYPE_NAMES[precision])
    peak, source = peak_flops(device, dtype)
    log(f"peak of one device: {peak / 1e12:.3g} TFLOP/s in {precision} ({source})")
    if device.type != "cpu" and resolved.data.document_mask and not has_varlen_attention(device):
        log(
            "no variable-length attention here (NVIDIA GPUs from sm80 on have it): documents are masked, rows computed "
            "whole"
        )
    is_autoep = device.type != "cpu" and resolved.train.moe_backend == "autoep"
    if is_autoep and find_grouped_product(precision, device) == "loop":
        log(
            f"experts: in {precision} on {device_name(device)} a layer's are multiplied one after another, and the "
            "host waits for the device in each layer; on NVIDIA GPUs all at once in bf16, and in fp16 where Triton is"
        )
    if compute_capability(device) is not None and precision == "fp32":
        log("TF32 is off: fp32 products are computed in full; bf16 is the fast way")
    if device.type == "cpu" and dtype != torch.float32 and not has_fast_matmul(dtype):
        log(f"this processor has no matmul in {precision}: computed in float32 and rounded, at its speed")
    return peak


def load_state(
    engine: deepspeed.DeepSpeedEngine, resolved: ResolvedRun, resume: Resume | None, fingerprint: DataFingerprint
) -> TrainState:
    """Load the checkpoint to resume from, if any, and give the run's position. Every rank calls this."""
    if resume is None:
        return TrainState()
    state = load_checkpoint(engine, resolved, resume.folder, resume.manifest, is_resharded=resume.is_resharded)
    log(f"resumed from {resume.folder} at step {state.step}")
    if resume.manifest.shard_fingerprint != fingerprint.fingerprint:
        state = dataclasses.replace(state, data_start_step=state.step, data_start_windows=state.windows_taken)
        log(f"the shards are new: their order begins at step {state.step}")
    return state


def make_loader(
    resolved: ResolvedRun, dataset: Dataset, mesh: Mesh, state: TrainState, *, pin_memory: bool
) -> BatchLoader:
    """This rank's training batches."""
    train = resolved.train
    loader = BatchLoader(
        dataset,
        train.seed,
        train.micro_batch_size,
        train.global_batch_size,
        mesh.dp_rank,
        mesh.dp_size,
        SequencePart(mesh.sp_rank, mesh.sp_size),
        first_step=state.data_start_step,
        taken=state.data_start_windows,
        window_warmup_steps=resolved.data.window_warmup_steps,
        pin_memory=pin_memory,
    )
    check_length(loader.order, train.steps - loader.first_step, train.global_batch_size)
    if state.data_start_step:  # what --dry-run says is of a run that began so
        for line in describe_mixture(dataset, loader.order, train.global_batch_size, train.steps, loader.first_step):
            log(line)
    return loader


def open_record(
    resolved: ResolvedRun, env: RankEnvironment, state: TrainState, resume: Resume | None, peak: float
) -> NullRecord:
    """The run's record on rank 0, a null record on all others. Every rank calls this.

    Args:
        peak: of one device, in FLOP/s.
    """
    hosts = gather_objects(socket.gethostname())
    if not env.is_first:
        return NullRecord()
    run, run_dir = resolved.run, Path(resolved.train.run_dir)
    project = run.train.wandb_project
    try:
        record = RunRecord(
            run_dir,
            state.step,
            resolved.train.steps,
            peak_tokens_per_second=peak * env.world_size / resolved.flops_per_token,
            tensorboard=run.train.tensorboard,
            hosts=hosts,
            wandb=WandbLog(project, run_dir, run.to_dict()) if project is not None else None,
        )
    except OSError as error:
        raise UserError(f"{error.filename or run_dir}: {error.strerror}; free disk space, or fix the file") from None
    if resume is not None:
        record.log_event("resume", state.step, f"resumed from {resume.folder.name}")
    else:
        record.log_event("start", state.step, "started")
    return record


def memory_remedies(resolved: ResolvedRun) -> list[str]:
    """The flags that lower the memory of this run, cheapest first."""
    train = resolved.train
    found = [f"lower --micro-batch-size {train.micro_batch_size}"] if train.micro_batch_size > 1 else []
    if not train.activation_checkpointing:
        found.append("pass --activation-checkpointing")
    if resolved.zero.stage < 3:
        found.append(f"take a ZeRO stage above {resolved.zero.stage} (--ds-config)")
    return [*found, f"shorten --seq-len {resolved.data.seq_len}", "--dry-run itemises what a rank needs"]
