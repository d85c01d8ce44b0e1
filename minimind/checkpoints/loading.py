"""Resume: choose a checkpoint of a run folder and load it into an engine.

On the same ranks, ZeRO stage and precision DeepSpeed loads its own files, and the run continues bit for bit; otherwise
the state goes through the portable form.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param

from minimind.checkpoints.consolidate import TrainingCheckpoint
from minimind.checkpoints.engine_files import use_state_files
from minimind.checkpoints.folder import (
    check_latest,
    checkpoints_folder,
    list_checkpoints,
    newest_valid,
    step_of,
    verify_checkpoint,
)
from minimind.checkpoints.manifest import CLIENT_STATE_KEY, CheckpointError, CheckpointManifest
from minimind.checkpoints.portable_loading import load_portable, part_of
from minimind.checkpoints.probe import check_probe_loss, probe_loss
from minimind.checkpoints.run_state import TrainState
from minimind.config.resolved_run import ResolvedRun
from minimind.distributed.collectives import log
from minimind.parallel.loss_scale import set_grad_scaler


def find_resume(run_dir: Path, resume: str, report: Callable[[str], Any] = log) -> Path | None:
    """The checkpoint that `--resume` asks for, compared with its manifest, or None for a fresh start. One rank calls
    this.

    Args:
        resume: "auto", "never", or the path of a checkpoint folder or of a run folder.

    Raises:
        CheckpointError: "never" where checkpoints are; nothing valid; a path that holds no valid checkpoint.
    """
    if resume == "never":
        there = list_checkpoints(run_dir)
        if there:
            raise CheckpointError(
                f"--resume never: {run_dir} already holds {there[-1].name}; give another --run-dir, or use "
                "--resume auto"
            )
        return None
    if resume == "auto":
        found = newest_valid(run_dir, report)
        if found is not None:
            check_latest(run_dir, found, report)
        return found
    path = Path(resume)
    if checkpoints_folder(path).is_dir():
        found = newest_valid(path, report)
        if found is None:
            raise CheckpointError(f"--resume {resume}: the run holds no checkpoint")
    else:
        verify_checkpoint(path)
        found = path
    _check_nothing_newer(run_dir, found)
    return found


def _check_nothing_newer(run_dir: Path, chosen: Path) -> None:
    """Two futures in one folder would be taken for one by the next `--resume auto`."""
    newer = [folder.name for folder in list_checkpoints(run_dir) if step_of(folder) > step_of(chosen)]
    if newer:
        raise CheckpointError(
            f"--resume {chosen}: {run_dir} also holds {', '.join(newer)}, which a later --resume auto would continue "
            "from; delete them, or give another --run-dir"
        )


def load_checkpoint(
    engine: deepspeed.DeepSpeedEngine,
    resolved: ResolvedRun,
    folder: Path,
    manifest: CheckpointManifest,
    portable: Path | None,
) -> TrainState:
    """Bring a verified checkpoint into the engine, and check its probe loss. Every rank calls this.

    Args:
        portable: the checkpoint's portable form, where the topology has changed.

    Raises:
        CheckpointError: DeepSpeed refuses it, or the engine does not compute what it computed when it was saved.
    """
    if portable is None:
        with use_state_files(engine), keep_settings(engine.optimizer):
            path, client_state = engine.load_checkpoint(str(folder.parent), tag=folder.name)
        if path is None:
            raise CheckpointError(f"{folder}: DeepSpeed could not load it")
        set_grad_scaler(engine, client_state[CLIENT_STATE_KEY].get("grad_scaler"))
    else:
        load_portable(engine, portable, resolved)
    check_probe_loss(
        folder,
        manifest,
        lambda: engine_probe_loss(engine, resolved),
        low_precision=not manifest.precision == resolved.train.precision == "fp32",
        find_differences=lambda: find_differences(engine, resolved, TrainingCheckpoint(folder, manifest)),
    )
    return TrainState(manifest.step, manifest.consumed_samples, manifest.tokens_seen, manifest.data_start_step)


@contextlib.contextmanager
def keep_settings(optimizer: Any) -> Iterator[None]:
    """DeepSpeed loads the optimizer's settings with its state; those of the present run count."""
    names = ("betas", "eps", "weight_decay", "momentum")
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
        part = part_of(name, resolved)
        theirs = checkpoint.read(part.name)[part.index]
        with deepspeed.zero.GatheredParameters([parameter]):
            same = torch.equal(parameter.data.cpu(), theirs.to(parameter.dtype))
        copy = safe_get_full_fp32_param(parameter)  # None at stage 0
        if not same or (copy is not None and not torch.equal(copy.float().cpu().view(theirs.shape), theirs)):
            differing.append(name)
    return differing
