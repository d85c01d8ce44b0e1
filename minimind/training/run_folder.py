"""A run's folder at the start of a job: whether it is this run's, the checkpoint to resume from, its configuration.

`run_config.json` and `ds_config.json` describe the job that runs now. `AT_RESUME` says what a resumed run may change.
"""

import dataclasses
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minimind.checkpoints.consolidate import TrainingCheckpoint
from minimind.checkpoints.folder import checkpoint_name, checkpoints_folder, list_checkpoints, step_of
from minimind.checkpoints.loading import find_resume
from minimind.checkpoints.manifest import CheckpointError, CheckpointManifest, read_manifest
from minimind.checkpoints.remote_copies import fetch_newest
from minimind.checkpoints.retention import clear_partials
from minimind.checkpoints.run_state import DataFingerprint, compare, describe_run, find_obstacles, settings_of
from minimind.config.deepspeed_file import load_ds_config
from minimind.config.deepspeed_keys import optimizer_name
from minimind.config.resolved_run import ResolvedRun, ResolvedTrain
from minimind.config.run_config import SHARD_FINGERPRINT, SOURCE_FINGERPRINTS, RunConfig, TrainConfig
from minimind.data.chat_template import TEMPLATE_NAME
from minimind.data.dataset import Dataset
from minimind.data.mixture import Mixture
from minimind.distributed.collectives import log
from minimind.distributed.share import Share, share_among_threads
from minimind.errors import UserError
from minimind.files import read_json, replace_file, write_json
from minimind.model.config import ModelConfig
from minimind.training.record.events import read_events
from minimind.training.record.run_files import DS_CONFIG_NAME, RUN_CONFIG_NAME


@dataclass(frozen=True)
class Resume:
    """A checkpoint to continue from."""

    folder: Path
    manifest: CheckpointManifest
    is_resharded: bool
    """It was saved on another topology."""


def identify(dataset: Dataset) -> DataFingerprint:
    """What identifies the training data of a run."""
    return DataFingerprint(dataset.fingerprint, tokenizer_sha256=dataset.reader.manifest.tokenizer.sha256)


def check_run_folder(resolved: ResolvedRun, corpus: DataFingerprint) -> list[str]:
    """Refuse a run folder of a different run; gives the allowed changes since its last start, in words.

    Raises:
        UserError: listing every difference.
    """
    path = Path(resolved.train.run_dir) / RUN_CONFIG_NAME
    if not path.exists():
        return []
    content = read_json(path, "the run folder's")
    fingerprint = None
    if isinstance(content, dict):
        fingerprint = content.pop(SHARD_FINGERPRINT, None)
        content.pop(SOURCE_FINGERPRINTS, None)
    there = _settings(RunConfig.from_dict(content, where=str(path)), fingerprint)
    here = _settings(resolved.run, corpus.fingerprint)
    obstacles = find_obstacles(there, here, allow_data_change=resolved.train.allow_data_change)
    if obstacles:
        raise UserError(
            f"{path.parent} belongs to another configuration: {'; '.join(obstacles)}; give another --run-dir, or the "
            "old values"
        )
    changes = [*compare(there, here, "free"), *compare(there, here, "topology")]
    return [
        f"{name} is {now} from here on; it was {before}"
        for name, before, now in changes
        if before is not None and now is not None
    ]


def recorded_micro_batch_size(train: ResolvedTrain) -> int | None:
    """The micro-batch that the run in this folder has begun with; None: nothing has begun there, or it begins anew."""
    path = Path(train.run_dir) / RUN_CONFIG_NAME
    if train.resume == "never" or not path.exists():
        return None
    content = read_json(path, "the run folder's")
    size = content.get("train", {}).get("micro_batch_size") if isinstance(content, dict) else None
    return size if isinstance(size, int) else None


def recorded_fingerprints(train: TrainConfig) -> list[str]:
    """The fingerprint of the shards, or of each source, that a run in this folder which goes on began with. With
    --allow-data-change it takes what is there now: none, as of a run that begins."""
    path = Path(train.run_dir) / RUN_CONFIG_NAME
    if train.resume == "never" or train.allow_data_change or not path.exists():
        return []
    content = read_json(path, "the run folder's")
    content = content if isinstance(content, dict) else {}
    return content.get(SOURCE_FINGERPRINTS) or [content.get(SHARD_FINGERPRINT)]


def settle_optimizer(run: RunConfig) -> RunConfig:
    """`run` with the optimizer that the run in its folder has, where neither a flag nor the JSON names one."""
    path = Path(run.train.run_dir) / RUN_CONFIG_NAME
    if run.train.optimizer is not None or run.train.resume == "never" or not path.exists():
        return run
    content = read_json(path, "the run folder's")
    train = content.get("train") if isinstance(content, dict) else None
    name = train.get("optimizer") if isinstance(train, dict) else None
    named = optimizer_name(load_ds_config(run.train.ds_config))
    if named is not None or name not in ("adamw", "muon"):
        return run
    return dataclasses.replace(run, train=dataclasses.replace(run.train, optimizer=name))


def settle_aux_loss_scope(run: RunConfig) -> RunConfig:
    """`run` with its form of balancing experts: as asked for, as the run in its folder began, or over the whole step. A
    run that began before there was a choice balances each micro-batch by itself."""
    if not run.model.use_moe or run.model.aux_loss_scope is not None:
        return run
    path, scope = Path(run.train.run_dir) / RUN_CONFIG_NAME, "global"
    if path.exists():
        content = read_json(path, "the run folder's")
        model = content.get("model") if isinstance(content, dict) else None
        scope = (model.get("aux_loss_scope") if isinstance(model, dict) else None) or "micro"
    model = ModelConfig.from_dict({**run.model.to_dict(), "aux_loss_scope": scope})
    return dataclasses.replace(run, model=model)


def _settings(run: RunConfig, fingerprint: str | None) -> dict[str, Any]:
    return {**vars(run.model), **vars(run.data), **vars(run.train), "shards": fingerprint and fingerprint[:12]}


def open_run_folder(
    resolved: ResolvedRun, dataset: Dataset, notes: list[str], share: Share = share_among_threads
) -> Resume | None:
    """Find what to continue from, and write the resolved configurations and the tokenizer into the folder. Rank 0
    alone, inside the process group and holding the folder's lock; all ranks read for it by `share`.

    Raises:
        UserError: nothing valid to continue from, another run's checkpoint, or a folder that cannot be written.
    """
    run_dir = Path(resolved.train.run_dir)
    corpus, reader = identify(dataset), dataset.reader
    try:
        for line in clear_partials(run_dir):
            log(line)
        fetch_stored(resolved.train)
        folder = find_resume(run_dir, resolved.train.resume, share)
        _check_nothing_lost(run_dir, folder, resolved.train.resume)
        resume = None if folder is None else _plan_resume(folder, resolved, corpus, notes)
        data: dict[str, Any] = {SHARD_FINGERPRINT: corpus.fingerprint}
        if isinstance(dataset, Mixture):
            data[SOURCE_FINGERPRINTS] = [reader.fingerprint for reader in dataset.readers]
        write_json(run_dir / RUN_CONFIG_NAME, {**resolved.run.to_dict(), **data})
        write_json(run_dir / DS_CONFIG_NAME, resolved.ds)
        tokenizer_file = reader.folder / reader.manifest.tokenizer.file
        replace_file(run_dir / f"tokenizer{tokenizer_file.suffix}", tokenizer_file.read_bytes())
        if reader.manifest.is_chat:
            replace_file(run_dir / TEMPLATE_NAME, (reader.folder / TEMPLATE_NAME).read_bytes())
    except OSError as error:
        where = error.filename2 or error.filename or run_dir
        raise UserError(f"run_dir {where}: {error.strerror}; give a folder that can be written") from None
    return resume


def fetch_stored(train: ResolvedTrain) -> None:
    """Where the run's folder holds no checkpoint, bring the newest that was stored elsewhere. Raises `UserError`."""
    run_dir, url = Path(train.run_dir), train.store_checkpoints
    if url is None or train.resume != "auto" or list_checkpoints(run_dir):
        return
    if (found := fetch_newest(url, run_dir)) is not None:
        log(f"{found.name} was fetched from {url}: {run_dir} held no checkpoint")


def _check_nothing_lost(run_dir: Path, found: Path | None, resume: str) -> None:
    """Refuse to begin anew in the folder of a run that has saved; say when the newest that it saved is gone."""
    saved = 0
    for event in read_events(run_dir):
        if event.event in ("start", "save"):  # a start begins anew, at step 0
            saved = max(saved, event.step) if event.event == "save" else 0
    newest = checkpoints_folder(run_dir) / checkpoint_name(saved)
    if found is None and saved and resume == "auto":
        raise CheckpointError(
            f"{run_dir}: its events.jsonl says that step {saved} was saved, and {newest.parent} holds no checkpoint; "
            "bring them back, give another --run-dir, or begin anew here with --resume never"
        )
    if found is not None and step_of(found) < saved and not newest.exists():
        log(f"{newest}: saved by this run, and gone; continuing from the older {found.name}")


def _plan_resume(folder: Path, resolved: ResolvedRun, corpus: DataFingerprint, notes: list[str]) -> Resume:
    manifest = read_manifest(folder)
    there, here = settings_of(manifest), settings_of(CheckpointManifest(**describe_run(resolved, corpus)))
    obstacles = find_obstacles(there, here, allow_data_change=resolved.train.allow_data_change)
    if obstacles:
        raise CheckpointError(f"checkpoint of step {manifest.step}: cannot continue this run: {'; '.join(obstacles)}")
    for note in notes:
        log(f"changed: {note}")
    found = {name: version(name) for name in manifest.versions}
    others = [f"{name} {saved} -> {found[name]}" for name, saved in manifest.versions.items() if saved != found[name]]
    if others:
        log(f"{folder.name} was saved by other libraries ({'; '.join(others)}): losses may differ in their last digits")
    changes = [f"{name} {before} -> {now}" for name, before, now in compare(there, here, "topology")]
    if changes:
        TrainingCheckpoint(folder, manifest)  # one line, before the model is built, for what cannot be read
        log(f"{folder.name}: {'; '.join(changes)}: every rank reads its part of the files")
    return Resume(folder, manifest, bool(changes))
