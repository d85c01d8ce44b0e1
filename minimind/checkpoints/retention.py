"""Which checkpoints to keep, how to delete one, and what to do about an interrupted save.

Folders are renamed before deletion, so that a half-deleted checkpoint never passes for a complete one.
"""

import contextlib
import os
import shutil
from pathlib import Path

from minimind.checkpoints.folder import (
    PORTABLE_PREFIX,
    checkpoint_name,
    checkpoints_folder,
    list_checkpoints,
    portable_folder,
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
    # A file system may keep a name of what another process has open; the next start tries again.
    shutil.rmtree(renamed, ignore_errors=True)


def prune(
    run_dir: Path,
    *,
    keep_last: int,
    keep_every: int = 0,
    keep_best: int = 1,
    newest_valid: Path | None = None,
    dry_run: bool = False,
) -> list[Path]:
    """Delete old checkpoints and give them, oldest first: all but the newest `keep_last` (0: all stay), the multiples
    of `keep_every`, the `keep_best` of lowest evaluation loss, and `newest_valid`, the newest whose hashes were
    compared. Portable forms of checkpoints that are no more go too.

    Only those whose files are there in full count, so damaged ones never push out a valid one; they stay themselves.
    """
    found: list[tuple[Path, CheckpointManifest]] = []
    for folder in list_checkpoints(run_dir):
        with contextlib.suppress(CheckpointError):
            found.append((folder, verify_checkpoint(folder, hashes=False)))
    rated = sorted((manifest.eval_loss, folder) for folder, manifest in found if manifest.eval_loss is not None)
    kept = {newest_valid, *(folder for _, folder in rated[:keep_best])}
    expired = [
        folder
        for folder, manifest in (found[:-keep_last] if keep_last else [])
        if folder not in kept and not (keep_every and manifest.step % keep_every == 0)
    ]
    if not dry_run:
        for folder in expired:
            remove_checkpoint(folder)
        whole = {portable_folder(folder) for folder in list_checkpoints(run_dir)}
        for portable in checkpoints_folder(run_dir).glob(f"{PORTABLE_PREFIX}*[0-9]"):  # not what is being written
            if portable not in whole:
                _remove(portable)
    return expired


def clear_partials(run_dir: Path) -> list[str]:
    """Deal with what a save that was interrupted has left, and say what was done.

    A folder that is complete and only lacks its name gets it; other partial folders are deleted.
    """
    folder = checkpoints_folder(run_dir)
    said = []
    for path in sorted(path for path in folder.glob(f"*{PARTIAL_SUFFIX}") if path.is_dir()):
        with contextlib.suppress(CheckpointError):
            manifest = read_manifest(path)
            verify_files(path, manifest, hashes=False)  # read when it is resumed from, by all ranks
            final = folder / checkpoint_name(manifest.step)
            if path.name.startswith("step_") and not final.exists():
                os.replace(path, final)
                fsync_folder(folder)
                said.append(f"{final}: an earlier run was interrupted while naming it; it is complete")
                continue
        shutil.rmtree(path, ignore_errors=True)
        said.append(f"removed {path}: an earlier run was interrupted while writing it")
    return said
