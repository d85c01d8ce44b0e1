"""Checkpoints in object stores: each that a run has saved is copied there, and any is fetched from there.

What lies there is a run's folder as far as a model needs it. A checkpoint's manifest arrives last, and names every file
with its hash: without it there is no checkpoint.
"""

import shutil
from pathlib import Path

from minimind.cache import cache_folder, name_of, one_at_a_time
from minimind.checkpoints.folder import LATEST_NAME, checkpoint_name, checkpoints_folder, step_of
from minimind.checkpoints.manifest import MANIFEST_NAME, CheckpointError, read_manifest
from minimind.files import disk_errors, partial_folder, publish
from minimind.remote import fetch, join_url, list_files, store, store_folder

_STORED = ("run_config.json", "ds_config.json", "tokenizer.*", "chat_template.jinja", "metrics.jsonl", "events.jsonl")
"""Files of a run's folder that go with its checkpoints."""


def store_checkpoint(run_dir: Path, folder: Path, url: str) -> None:
    """Copy a checkpoint that is complete, and what of its run is needed to use it, to the run's folder at `url`.

    Raises:
        RemoteError: it does not arrive; no checkpoint is there by this name then.
    """
    for path in sorted(path for pattern in _STORED for path in run_dir.glob(pattern)):
        store(path, join_url(url, path.name))
    checkpoints = join_url(url, "checkpoints")
    store_folder(folder, join_url(checkpoints, folder.name), (MANIFEST_NAME,))
    store(checkpoints_folder(run_dir) / LATEST_NAME, join_url(checkpoints, LATEST_NAME))


def fetch_newest(url: str, run_dir: Path) -> Path | None:
    """Bring the newest checkpoint of the run at `url`, or the checkpoint that `url` is, into `run_dir`; None: there is
    none. Every file is compared with its manifest.

    Raises:
        CheckpointError: it is damaged.
        RemoteError: it does not come.
    """
    there = list_files(url, recursive=True)
    if MANIFEST_NAME in there:
        name = url.rstrip("/").rpartition("/")[2]
        step_of(Path(name))
    else:
        found = [path.split("/") for path in there if path.endswith(f"/{MANIFEST_NAME}")]
        steps = [step_of(Path(parts[1])) for parts in found if parts[0] == "checkpoints" and len(parts) == 3]
        if not steps:
            return None
        name = checkpoint_name(max(steps))
        url = join_url(url, f"checkpoints/{name}")
    final = checkpoints_folder(run_dir) / name
    if final.exists():
        return final
    partial = partial_folder(final)
    try:
        with disk_errors(run_dir):
            partial.mkdir(parents=True)
            fetch(join_url(url, MANIFEST_NAME), partial / MANIFEST_NAME)
            for record in read_manifest(partial).files:
                if not (partial / record.path).resolve().is_relative_to(partial.resolve()):
                    raise CheckpointError(f"{url}: {record.path} leaves the checkpoint's folder")
                (partial / record.path).parent.mkdir(parents=True, exist_ok=True)
                fetch(join_url(url, record.path), partial / record.path, record.sha256)
            publish(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def localise_model(url: str) -> Path:
    """A copy of a run's newest checkpoint, of a checkpoint or of an export at `url`, kept in the cache until another
    one of the same place is asked for.

    Raises:
        CheckpointError: nothing is there, or it is damaged.
        RemoteError: it does not come.
    """
    there = list_files(url, recursive=True)
    if not there:
        raise CheckpointError(f"{url}: no such folder; give a run's, or that of a checkpoint or an export")
    is_step = MANIFEST_NAME in there
    is_run = any(path.startswith("checkpoints/") for path in there)
    run_url = url.rstrip("/").removesuffix("/" + url.rstrip("/").rpartition("/")[2]).removesuffix("/checkpoints")
    folder = cache_folder() / "models" / name_of(run_url if is_step else url)
    with disk_errors(folder), one_at_a_time(folder):
        if not is_step and not is_run:
            for path in there:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                fetch(join_url(url, path), folder / path)
            return folder
        step = fetch_newest(url, folder)
        if step is None:
            raise CheckpointError(f"{url}: the run has not stored any checkpoint")
        for other in checkpoints_folder(folder).iterdir():
            if other != step:
                shutil.rmtree(other)
        names = there if is_run else list_files(run_url)
        for path in names:
            if any(Path(path).match(pattern) for pattern in _STORED[:4]) and "/" not in path:
                fetch(join_url(url if is_run else run_url, path), folder / path)
    return step
