"""Resume: choose a checkpoint of a run folder and load it into an engine.

On the same ranks, ZeRO stage and precision DeepSpeed loads its own files, and the run continues bit for bit; otherwise
each rank reads its part of them (`reshard`).
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param

from minimind.checkpoints.consolidate import TrainingCheckpoint
from minimind.checkpoints.engine_files import use_state_files
from minimind.checkpoints.folder import check_latest, find_checkpoint, list_checkpoints, newest_valid, step_of
from minimind.checkpoints.manifest import (
    CLIENT_STATE_KEY,
    CheckpointError,
    CheckpointManifest,
    TrainState,
    read_manifest,
)
from minimind.checkpoints.probe import check_probe_loss, probe_loss
from minimind.checkpoints.reshard import load_resharded, part_of
from minimind.config.resolved_run import ResolvedRun
from minimind.distributed.collectives import gather_objects, log
from minimind.distributed.share import Share
from minimind.errors import UserError, first_line
from minimind.parallel.loss_scale import set_grad_scaler
from minimind.parallel.optimizer_state import drop_states
from minimind.parallel.sequence import whole_rows


def find_resume(run_dir: Path, resume: str, share: Share, report: Callable[[str], Any] = log) -> Path | None:
    """The checkpoint that `--resume` asks for, compared with its manifest, or None for a fresh start. One rank calls
    this.

    Args:
        resume: "auto", "never", or the path of a checkpoint folder or of a run folder.
        share: who reads the files that are compared.

    Raises:
        CheckpointError: "never" where checkpoints are; nothing valid; a path that holds no valid checkpoint.
    """
    there = list_checkpoints(run_dir)
    if resume == "never" and there:
        raise CheckpointError(
            f"--resume never: {run_dir} already holds {there[-1].name}; give another --run-dir, or use --resume auto"
        )
    if resume in ("never", "auto"):
        found = newest_valid(run_dir, report, share)
        if found is not None:
            check_latest(run_dir, found, report)
        return found
    chosen = find_checkpoint(Path(resume), report, share)
    # Two futures in one folder would be taken for one by the next `--resume auto`.
    newer = [folder.name for folder in there if step_of(folder) > step_of(chosen)]
    if newer:
        raise CheckpointError(
            f"--resume {chosen}: {run_dir} also holds {', '.join(newer)}, which a later --resume auto would continue "
            "from; delete them, or give another --run-dir"
        )
    return chosen


def load_checkpoint(
    engine: deepspeed.DeepSpeedEngine,
    resolved: ResolvedRun,
    folder: Path,
    manifest: CheckpointManifest,
    *,
    is_resharded: bool,
) -> TrainState:
    """Bring a verified checkpoint into the engine, and check its probe loss. Every rank calls this.

    Args:
        is_resharded: it was saved on another topology.

    Raises:
        CheckpointError: DeepSpeed refuses it, or the engine does not compute what it computed when it was saved.
    """
    if not is_resharded:
        # A scheduler of DeepSpeed's moves betas and momentum, so there the saved ones count.
        own = (
            ("eps", "weight_decay")
            if resolved.train.schedule == "deepspeed"
            else ("eps", "weight_decay", "betas", "momentum")
        )
        with use_state_files(engine), keep_settings(engine.optimizer, own):
            # Frozen weights are not in the files: the engine has them, as --init-from gave them.
            path, client_state = engine.load_checkpoint(
                str(folder.parent), tag=folder.name, load_module_strict=not resolved.train.keeps_frozen
            )
        if path is None:
            raise CheckpointError(f"{folder}: DeepSpeed could not load it")
        set_grad_scaler(engine, client_state[CLIENT_STATE_KEY].get("grad_scaler"))
    else:
        load_resharded(engine, TrainingCheckpoint(folder, manifest), resolved)
    check_probe_loss(
        folder,
        manifest,
        lambda: engine_probe_loss(engine, resolved),
        low_precision=not manifest.precision == resolved.train.precision == "fp32",
        find_differences=lambda: find_differences(engine, resolved, TrainingCheckpoint(folder, manifest)),
    )
    return TrainState(**{field.name: getattr(manifest, field.name) for field in dataclasses.fields(TrainState)})


def prove_resumable(engine: deepspeed.DeepSpeedEngine, resolved: ResolvedRun, folder: Path) -> None:
    """Load a checkpoint into the engine that has just saved it, which changes nothing: a run that could never be
    resumed ends at its first save, and not at its first resume. Every rank calls this.

    Raises:
        CheckpointError: on every rank: DeepSpeed cannot load what it has saved.
    """
    if "nvme" in (resolved.zero.offload_optimizer, resolved.zero.offload_param):
        return  # it would overwrite swap files that are in use
    failure = None
    drop_states(engine)
    try:
        load_checkpoint(engine, resolved, folder, read_manifest(folder), is_resharded=False)
    except Exception as error:  # whatever DeepSpeed stumbles over
        failure = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
    failures = [reason for reason in gather_objects(failure) if reason]
    if failures:
        raise CheckpointError(
            f"{folder}: saved, but DeepSpeed cannot load it again ({failures[0]}), so this run cannot be resumed; "
            "change the DeepSpeed config. The weights can be exported"
        )


@contextlib.contextmanager
def keep_settings(optimizer: Any, names: Sequence[str]) -> Iterator[None]:
    """DeepSpeed loads the optimizer's settings with its state; of these, the present run's count."""
    groups = [{name: group[name] for name in names if name in group} for group in optimizer.param_groups]
    clip_grad = getattr(optimizer, "clip_grad", None)
    yield
    for group, settings in zip(optimizer.param_groups, groups, strict=True):
        group.update(settings)
    if clip_grad is not None:
        optimizer.clip_grad = clip_grad


def engine_probe_loss(engine: deepspeed.DeepSpeedEngine, resolved: ResolvedRun) -> float:
    """The probe loss of an engine, which is left in training mode. Every rank calls this."""
    engine.eval()
    with whole_rows(engine.module):
        loss = probe_loss(engine, resolved.model, engine.device)
    engine.train()
    return loss


def find_differences(
    engine: deepspeed.DeepSpeedEngine, resolved: ResolvedRun, checkpoint: TrainingCheckpoint
) -> list[str]:
    """Names of this rank's parameters that are not as in the files: in what forward uses, or in the float32 copies
    that stages 1 to 3 keep. Every rank calls this: they gather the tensors.
    """
    differing = []
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        part = part_of(name, resolved)
        theirs = checkpoint.read(part.name)[part.index]
        with deepspeed.zero.GatheredParameters([parameter]):
            same = torch.equal(parameter.data.cpu(), theirs.to(parameter.dtype))
        copy = safe_get_full_fp32_param(parameter)  # None at stage 0
        if not same or (copy is not None and not torch.equal(copy.float().cpu().view(theirs.shape), theirs)):
            differing.append(name)
    return differing
