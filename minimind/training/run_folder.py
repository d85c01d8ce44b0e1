"""A run's folder at the start of a job: whether it is this run's, the checkpoint to resume from, its configuration.

`run_config.json` and `ds_config.json` describe the job that runs now. `AT_RESUME` says what a resumed run may change.
"""

import dataclasses
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minimind.checkpoints.loading import find_resume
from minimind.checkpoints.manifest import CheckpointManifest, read_manifest
from minimind.checkpoints.portable import make_portable
from minimind.checkpoints.retention import clear_partials
from minimind.checkpoints.run_state import AT_RESUME, DataFingerprint, changes_topology, check_same_run
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import RunConfig
from minimind.data.shards import ShardReader
from minimind.distributed.collectives import log
from minimind.errors import UserError
from minimind.files import read_json, replace_file
from minimind.model.config import ModelConfig
from minimind.training.record.run_files import DS_CONFIG_NAME, RUN_CONFIG_NAME


@dataclass(frozen=True)
class Resume:
    """A checkpoint to continue from; `portable` is its portable form, where the topology has changed."""

    folder: Path
    manifest: CheckpointManifest
    portable: Path | None


def identify(reader: ShardReader) -> DataFingerprint:
    """What identifies the training data of a run."""
    return DataFingerprint(fingerprint=reader.fingerprint, tokenizer_sha256=reader.manifest.tokenizer.sha256)


def check_run_folder(resolved: ResolvedRun, corpus: DataFingerprint) -> list[str]:
    """Refuse a run folder of a different run; gives the allowed changes since its last start, in words.

    Raises:
        UserError: listing every difference.
    """
    train = resolved.train
    path = Path(train.run_dir) / RUN_CONFIG_NAME
    if not path.exists():
        return []
    content = read_json(path, "the run folder's")
    there = content.pop("shard_fingerprint", corpus.fingerprint) if isinstance(content, dict) else ""
    old = RunConfig.from_dict(content, where=str(path))
    differences, notes = [], []
    if there != corpus.fingerprint and not train.allow_data_change:
        differences.append(
            f"shards {there[:12]} there, {corpus.fingerprint[:12]} here (--allow-data-change if that is meant)"
        )
    for name, before, now in _changes(old, resolved.run):
        change = AT_RESUME.get(name, "free")
        if before is None or now is None or before == now or change == "silent":
            continue
        if change == "fixed":
            differences.append(f"{name} {before} there, {now} here")
        else:
            notes.append(f"{name} is {now} from here on; it was {before}")
    if differences:
        raise UserError(
            f"{path.parent} belongs to another configuration: {'; '.join(differences)}; give another --run-dir, or the "
            "old values"
        )
    return notes


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


def _changes(old: RunConfig, new: RunConfig) -> list[tuple[str, Any, Any]]:
    pairs = ((old.model, new.model), (old.data, new.data), (old.train, new.train))
    return [
        (item.name, getattr(before, item.name), getattr(now, item.name))
        for before, now in pairs
        for item in dataclasses.fields(now)
    ]


def open_run_folder(resolved: ResolvedRun, reader: ShardReader, notes: list[str]) -> Resume | None:
    """Find what to continue from, and write the resolved configurations and the tokenizer into the folder. Rank 0
    alone, inside the process group and holding the folder's lock.

    Raises:
        UserError: nothing valid to continue from, another run's checkpoint, or a folder that cannot be written.
    """
    run_dir = Path(resolved.train.run_dir)
    corpus = identify(reader)
    try:
        for line in clear_partials(run_dir):
            log(line)
        folder = find_resume(run_dir, resolved.train.resume)
        resume = None
        if folder is not None:
            resume = _plan_resume(folder, resolved, corpus)
            for note in notes:
                log(f"changed: {note}")
        content = {**resolved.run.to_dict(), "shard_fingerprint": corpus.fingerprint}
        replace_file(run_dir / RUN_CONFIG_NAME, json.dumps(content, indent=2) + "\n")
        replace_file(run_dir / DS_CONFIG_NAME, json.dumps(resolved.ds, indent=2) + "\n")
        tokenizer_file = reader.folder / reader.manifest.tokenizer.file
        replace_file(run_dir / f"tokenizer{tokenizer_file.suffix}", tokenizer_file.read_bytes())
    except OSError as error:
        raise UserError(f"run_dir {run_dir}: {error.strerror}; give a folder that can be written") from None
    return resume


def _plan_resume(folder: Path, resolved: ResolvedRun, corpus: DataFingerprint) -> Resume:
    manifest = read_manifest(folder)
    check_same_run(manifest, resolved, corpus, allow_data_change=resolved.train.allow_data_change)
    others = [
        f"{name} {there} -> {version(name)}" for name, there in manifest.versions.items() if there != version(name)
    ]
    if others:
        log(f"{folder.name} was saved by other libraries ({'; '.join(others)}): losses may differ in their last digits")
    changes = changes_topology(manifest, resolved)
    if not changes:
        return Resume(folder, manifest, None)
    log(f"{folder.name}: {'; '.join(changes)}: continuing through its portable form")
    return Resume(folder, manifest, make_portable(folder))
