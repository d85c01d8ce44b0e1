"""An engine's state to disk and back.

DeepSpeed writes its files into a folder that nothing names; they are flushed, hashed and listed in a manifest. Only
then the folder gets its name, `latest` moves, and old checkpoints go. What is loaded has been compared with its manifest
first. Knows nothing of the training loop.
"""

import dataclasses
import itertools
import os
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deepspeed
import torch

from minimind.atomic import fsync_folder, replace_file
from minimind.checkpoint_files import (
    CLIENT_STATE_KEY,
    MANIFEST_NAME,
    PARTIAL_SUFFIX,
    CheckpointError,
    CheckpointManifest,
    checkpoint_name,
    checkpoints_folder,
    list_files,
    newest_sound,
    point_latest,
    prune,
    read_manifest,
    record_file,
    verify,
)
from minimind.config import RunConfig
from minimind.distributed import barrier, gather_objects, log
from minimind.ds_config import Resolved


@dataclass(frozen=True)
class TrainState:
    """Where a run stands. Only what is global: anything of one rank is derived from it."""

    step: int = 0
    consumed_samples: int = 0
    tokens_seen: int = 0


def save(engine: deepspeed.DeepSpeedEngine, resolved: Resolved, state: TrainState, shard_fingerprint: str) -> Path:
    """Write a checkpoint of `state` and let old ones go. Every rank calls this. Returns its folder.

    A checkpoint of the same step is replaced: after a resume the same step was trained again.

    Raises:
        CheckpointError: on every rank, when one of them could not write; nothing that looks whole is left.
    """
    run = resolved.run
    run_dir = Path(run.train.run_dir)
    root = checkpoints_folder(run_dir)
    partial = root / (checkpoint_name(state.step) + PARTIAL_SUFFIX)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    failure = None
    if rank == 0:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as error:
            failure = f"{partial}: {error.strerror}"
    _agree(failure, partial)
    content = {**dataclasses.asdict(state), "shard_fingerprint": shard_fingerprint}
    if resolved.zero_stage == 0:
        # The optimizer's own file only numbers the parameters.
        groups = engine.optimizer.param_groups
        content["parameter_names"] = [[engine.param_names[param] for param in group["params"]] for group in groups]
    client_state = {CLIENT_STATE_KEY: content}
    engine.save_checkpoint(str(root), tag=partial.name, client_state=client_state, save_latest=False)
    barrier()  # every rank's files are written
    records = []
    try:
        records = [record_file(partial, name) for name in list_files(partial)[rank::world_size]]
    except OSError as error:
        failure = f"rank {rank}: {error.filename}: {error.strerror}"
    _agree(failure, partial)
    manifest = CheckpointManifest(
        **dataclasses.asdict(state),
        world_size=world_size,
        zero_stage=resolved.zero_stage,
        precision=run.train.precision or "fp32",
        shard_fingerprint=shard_fingerprint,
        model=run.model.to_dict(),
        versions={name: version(name) for name in ("torch", "deepspeed", "numpy")},
        files=tuple(sorted(itertools.chain(*gather_objects(records)), key=lambda record: record.path)),
    )
    if rank == 0:
        try:
            _publish(run, partial, manifest)
        except OSError as error:
            failure = f"{error.filename}: {error.strerror}"
    _agree(failure, partial)
    return root / checkpoint_name(state.step)


def _agree(failure: str | None, partial: Path) -> None:
    """Stop on every rank when one has failed, leaving nothing half-written. Every rank calls this."""
    failures = [reason for reason in gather_objects(failure) if reason]
    if failures:
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"checkpoint not saved: {failures[0]}; free space or fix the folder, then resume the run")


def _publish(run: RunConfig, partial: Path, manifest: CheckpointManifest) -> None:
    """Give a written checkpoint its name, durably, and prune. Rank 0 alone; no collective inside."""
    run_dir = Path(run.train.run_dir)
    replace_file(partial / MANIFEST_NAME, manifest.to_json())
    for folder in {path.parent for path in partial.rglob("*")} | {partial}:
        fsync_folder(folder)
    final = partial.with_name(partial.name.removesuffix(PARTIAL_SUFFIX))
    if final.exists():
        # The older folder steps aside under a name that nothing reads, so that one of the two always has the right one.
        aside = final.with_name(f"{final.name}.old{PARTIAL_SUFFIX}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(final, aside)
        os.replace(partial, final)
        shutil.rmtree(aside)
    else:
        os.replace(partial, final)
    fsync_folder(final.parent)
    point_latest(run_dir, final)
    prune(run_dir, keep_last=run.train.keep_last, keep_every=run.train.keep_every)


def find_resume(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint that `--resume` asks for, verified, or None for a fresh start. Before any process group.

    Args:
        resume: "auto", "never", or the path of a checkpoint folder or of a run folder.

    Raises:
        CheckpointError: "never" where checkpoints are; nothing sound; a path that holds no sound checkpoint.
    """
    if resume == "never":
        found = newest_sound(run_dir, lambda message: None)
        if found is not None:
            raise CheckpointError(
                f"--resume never: {run_dir} already holds {found.name}; give another --run-dir, or use --resume auto"
            )
        return None
    if resume == "auto":
        return newest_sound(run_dir, log)
    path = Path(resume)
    if checkpoints_folder(path).is_dir():
        found = newest_sound(path, log)
        if found is None:
            raise CheckpointError(f"--resume {resume}: the run holds no checkpoint")
        return found
    verify(path)
    return path


def check_same_run(folder: Path, resolved: Resolved, world_size: int, shard_fingerprint: str) -> CheckpointManifest:
    """Whether the checkpoint belongs to the run that is about to continue; every difference is listed.

    Raises:
        CheckpointError: other model, shards, ranks, ZeRO stage or precision.
    """
    manifest = read_manifest(folder)
    differences = []
    model = resolved.run.model.to_dict()
    for key in sorted(set(model) | set(manifest.model)):
        if model.get(key) != manifest.model.get(key):
            differences.append(f"{key} {manifest.model.get(key)!r} there, {model.get(key)!r} here")
    for key, here in (
        ("shard_fingerprint", shard_fingerprint),
        ("world_size", world_size),
        ("zero_stage", resolved.zero_stage),
        ("precision", resolved.run.train.precision),
    ):
        there = getattr(manifest, key)
        if there != here:
            differences.append(f"{key} {there!r} there, {here!r} here")
    if differences:
        raise CheckpointError(f"{folder}: cannot continue this run: {'; '.join(differences)}")
    return manifest


def load(engine: deepspeed.DeepSpeedEngine, folder: Path) -> TrainState:
    """Bring a verified checkpoint into the engine. Every rank calls this.

    Raises:
        CheckpointError: DeepSpeed refuses it, or it is not of this project.
    """
    path, client_state = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    content: dict[str, Any] = (client_state or {}).get(CLIENT_STATE_KEY, {})
    if path is None or not content:
        raise CheckpointError(f"{folder}: DeepSpeed could not load it")
    fields = {field.name for field in dataclasses.fields(TrainState)}
    return TrainState(**{key: value for key, value in content.items() if key in fields})
