"""From a run folder back into an engine: which checkpoint, whether it is this run's, and its state on any topology.

Where the ranks, the ZeRO stage and the precision are those of the checkpoint, DeepSpeed loads its own files and the run
goes on bit for bit; otherwise through the neutral form. Knows nothing of the training loop.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param

from minimind.checkpoints.manifest import (
    CLIENT_STATE_KEY,
    CheckpointError,
    CheckpointManifest,
    check_latest,
    checkpoints_folder,
    list_checkpoints,
    newest_sound,
    step_of,
    verify,
)
from minimind.checkpoints.saving import TrainState
from minimind.checkpoints.consolidate import TrainingCheckpoint
from minimind.distributed.environment import log
from minimind.config.resolve import Resolved
from minimind.parallel.loss_scale import set_grad_scaler
from minimind.checkpoints.portable_loading import load_neutral, part_of
from minimind.checkpoints.probe import agrees, probe_loss
from minimind.checkpoints.run_state import Corpus, describe_layout, describe_sampling
from minimind.checkpoints.engine_files import use_state_files


def find_resume(run_dir: Path, resume: str, report: Callable[[str], Any] = log) -> Path | None:
    """The checkpoint that `--resume` asks for, compared with its manifest, or None for a fresh start. One rank calls
    this.

    Args:
        resume: "auto", "never", or the path of a checkpoint folder or of a run folder.

    Raises:
        CheckpointError: "never" where checkpoints are; nothing sound; a path that holds no sound checkpoint.
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
        found = newest_sound(run_dir, report)
        if found is not None:
            check_latest(run_dir, found, report)
        return found
    path = Path(resume)
    if checkpoints_folder(path).is_dir():
        found = newest_sound(path, report)
        if found is None:
            raise CheckpointError(f"--resume {resume}: the run holds no checkpoint")
    else:
        verify(path)
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


def check_same_run(
    manifest: CheckpointManifest, resolved: Resolved, corpus: Corpus, *, allow_data_change: bool
) -> None:
    """Refuse to continue what cannot be continued: another model, other shards, another tokenizer.

    Raises:
        CheckpointError: listing every difference.
    """
    differences = []
    model = resolved.run.model.to_dict()
    for key in sorted(set(model) | set(manifest.model)):
        if model.get(key) != manifest.model.get(key) and key not in RUNTIME_FIELDS:
            differences.append(f"{key} {manifest.model.get(key)!r} there, {model.get(key)!r} here")
    for key, value in describe_sampling(resolved).items():
        if value != manifest.sampling.get(key, value):
            differences.append(f"{key} {manifest.sampling[key]!r} there, {value!r} here")
    if manifest.tokenizer_sha256 != corpus.tokenizer_sha256:
        differences.append(f"tokenizer {manifest.tokenizer_sha256[:12]} there, {corpus.tokenizer_sha256[:12]} here")
    elif manifest.shard_fingerprint != corpus.fingerprint and not allow_data_change:
        differences.append(
            f"shards {manifest.shard_fingerprint[:12]} there, {corpus.fingerprint[:12]} here (--allow-data-change if "
            "that is meant)"
        )
    if differences:
        raise CheckpointError(f"checkpoint of step {manifest.step}: cannot continue this run: {'; '.join(differences)}")


_TRAINING_FIELDS = ("initializer_range", "router_aux_loss_coef", "router_z_loss_coef", "seq_aux")
RUNTIME_FIELDS = frozenset(("flash_attn", "dropout", "attention_dropout", *_TRAINING_FIELDS))
"""Fields of the model that change neither a weight nor what the model computes from them."""


def changes_topology(manifest: CheckpointManifest, resolved: Resolved) -> list[str]:
    """What about the ranks, the stage and DeepSpeed's layout is not as it was; nothing: DeepSpeed's files fit."""
    there = {
        "world_size": manifest.world_size,
        "zero_stage": manifest.zero_stage,
        "ep_size": manifest.ep_size,
        "precision": manifest.precision,
        **manifest.layout,
    }
    here = {
        "world_size": torch.distributed.get_world_size(),
        "zero_stage": resolved.zero_stage,
        "ep_size": resolved.run.train.ep_size or 1,
        "precision": resolved.run.train.precision,
        **describe_layout(resolved),
    }
    return [f"{key} {there.get(key)} -> {here.get(key)}" for key in here if there.get(key) != here.get(key)]


def load(
    engine: deepspeed.DeepSpeedEngine,
    resolved: Resolved,
    folder: Path,
    manifest: CheckpointManifest,
    neutral: Path | None,
) -> TrainState:
    """Bring a verified checkpoint into the engine, and prove it by the probe. Every rank calls this.

    Args:
        neutral: the checkpoint's neutral form, where the topology has changed.

    Raises:
        CheckpointError: DeepSpeed refuses it, or the engine does not compute what it computed when it was saved.
    """
    if neutral is None:
        with use_state_files(engine), keep_settings(engine.optimizer):
            path, client_state = engine.load_checkpoint(str(folder.parent), tag=folder.name)
        if path is None:
            raise CheckpointError(f"{folder}: DeepSpeed could not load it")
        set_grad_scaler(engine, client_state[CLIENT_STATE_KEY].get("grad_scaler"))
    else:
        load_neutral(engine, neutral, resolved)
    prove(engine, resolved, folder, manifest)
    return TrainState(manifest.step, manifest.consumed_samples, manifest.tokens_seen)


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


def engine_probe_loss(engine: deepspeed.DeepSpeedEngine, resolved: Resolved) -> float:
    """The probe loss of an engine, which is left in training mode. Every rank calls this."""
    engine.eval()
    loss = probe_loss(engine, resolved.run.model, engine.device)
    engine.train()
    return loss


def prove(engine: deepspeed.DeepSpeedEngine, resolved: Resolved, folder: Path, manifest: CheckpointManifest) -> None:
    """Compare the engine's probe loss with the one that was saved. Every rank calls this.

    Raises:
        CheckpointError: they differ; it names the tensors of the engine that are not those of the checkpoint.
    """
    if manifest.probe_loss is None:
        return
    loss = engine_probe_loss(engine, resolved)
    low_precision = not manifest.precision == resolved.run.train.precision == "fp32"
    if agrees(manifest.probe_loss, loss, low_precision=low_precision):
        return
    differing = find_differences(engine, resolved, TrainingCheckpoint(folder, manifest))
    raise CheckpointError(
        f"{folder}: loaded, but the probe batch has loss {loss:.6f} instead of {manifest.probe_loss:.6f}; tensors that "
        f"differ: {', '.join(differing) or 'none: the model computes something else'}"
    )


def find_differences(
    engine: deepspeed.DeepSpeedEngine, resolved: Resolved, checkpoint: TrainingCheckpoint
) -> list[str]:
    """Names of this rank's parameters that are not as in the files: in what forward uses, or in the float32 copies
    that stages 1 to 3 keep. Every rank calls this: they gather the tensors.
    """
    differing = []
    for name, parameter in engine.module.named_parameters():
        part = part_of(name, resolved)
        theirs = checkpoint.read(part.name)[part.place]
        with deepspeed.zero.GatheredParameters([parameter]):
            same = torch.equal(parameter.data.cpu(), theirs.to(parameter.dtype))
        copy = safe_get_full_fp32_param(parameter)  # None at stage 0
        if not same or (copy is not None and not torch.equal(copy.float().cpu().view(theirs.shape), theirs)):
            differing.append(name)
    return differing
