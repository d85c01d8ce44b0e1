"""Which checkpoints to keep, how to delete one, and what to do about an interrupted save.

Folders are renamed before deletion, so that a half-deleted checkpoint never passes for a complete one.
"""

import contextlib
import os
import shutil
from pathlib import Path

from minimind.checkpoints.folder import (
    checkpoint_name,
    checkpoints_folder,
    list_checkpoints,
    list_portable,
    portable_folder,
    step_of,
    verify_checkpoint,
)
from minimind.checkpoints.manifest import CheckpointError, CheckpointManifest, read_manifest, verify_files
from minimind.files import PARTIAL_SUFFIX, fsync_folder, partial_folder


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, and its portable form if there is one."""
    for path in (portable_folder(folder), folder):
        if path.exists():
            _remove(path)


def _remove(path: Path) -> None:
    renamed = partial_folder(path)
    os.replace(path, renamed)
    fsync_folder(path.parent)
    shutil.rmtree(renamed)


def choose_expired(
    run_dir: Path, *, keep_last: int, keep_every: int, keep_best: int, newest_valid: Path | None = None
) -> list[Path]:
    """The checkpoints that may go, oldest first: all but the newest `keep_last` (0: all stay), the multiples of
    `keep_every`, the `keep_best` of lowest evaluation loss, and `newest_valid`, the newest whose hashes were compared.

    Only those whose files are there in full count, so damaged ones never push out a valid one; they stay themselves.
    """
    found: list[tuple[Path, CheckpointManifest]] = []
    for folder in list_checkpoints(run_dir):
        with contextlib.suppress(CheckpointError):
            found.append((folder, verify_checkpoint(folder, hashes=False)))
    if keep_last == 0:
        return []
    rated = sorted((manifest.eval_loss, folder) for folder, manifest in found if manifest.eval_loss is not None)
    best = {folder for _, folder in rated[:keep_best]}
    return [
        folder
        for folder, manifest in found[: -max(1, keep_last)]
        if folder not in best and folder != newest_valid and not (keep_every and manifest.step % keep_every == 0)
    ]


def prune(
    run_dir: Path, *, keep_last: int, keep_every: int = 0, keep_best: int = 1, newest_valid: Path | None = None
) -> list[Path]:
    """Delete what `choose_expired` finds and give it; portable forms of checkpoints that are no more go too."""
    expired = choose_expired(
        run_dir, keep_last=keep_last, keep_every=keep_every, keep_best=keep_best, newest_valid=newest_valid
    )
    for folder in expired:
        remove_checkpoint(folder)
    steps = {step_of(folder) for folder in list_checkpoints(run_dir)}
    for portable in list_portable(run_dir):
        if int(portable.name.partition("_")[2]) not in steps:
            _remove(portable)
    return expired


def clear_partials(run_dir: Path) -> list[str]:
    """Deal with what a save that was interrupted has left, and say what was done.

    A folder that is complete and only lacks its name gets it; other partial folders are deleted.
    """
    folder = checkpoints_folder(run_dir)
    said = []
    for path in sorted(folder.glob(f"*{PARTIAL_SUFFIX}")) if folder.is_dir() else []:
        step = _complete_step(path)
        final = folder / checkpoint_name(step or 0)
        if step is not None and not final.exists():
            os.replace(path, final)
            fsync_folder(folder)
            said.append(f"{final}: an earlier run was interrupted while naming it; it is complete")
        elif path.is_dir():
            shutil.rmtree(path)
            said.append(f"removed {path}: an earlier run was interrupted while writing it")
    return said


def _complete_step(path: Path) -> int | None:
    """The step of a checkpoint that is whole although its folder is not named so; None for anything else."""
    if not path.name.startswith("step_"):
        return None
    try:
        manifest = read_manifest(path)
        verify_files(path, manifest)
    except CheckpointError:
        return None
    return manifest.step
