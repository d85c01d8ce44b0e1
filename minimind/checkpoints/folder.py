"""The checkpoints folder of a run: names, order, `latest`, and the newest valid checkpoint."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minimind.checkpoints.manifest import CheckpointError, CheckpointManifest, read_manifest, verify_files
from minimind.distributed.share import Share, share_among_threads
from minimind.files import replace_file

LATEST_NAME = "latest"
PORTABLE_PREFIX = "neutral_"
"""What the portable form is called on disk."""
_NAME = re.compile(r"step_(\d{8,})")


def checkpoint_name(step: int) -> str:
    """`step_00001000` for 1000."""
    return f"step_{step:08d}"


def checkpoints_folder(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run by their names, oldest first; valid or not."""
    folder = checkpoints_folder(run_dir)
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def portable_folder(folder: Path) -> Path:
    """Where the portable form of a checkpoint is kept, beside it."""
    return folder.with_name(f"{PORTABLE_PREFIX}{step_of(folder):08d}")


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder.

    Raises:
        CheckpointError: the folder is not named like a checkpoint.
    """
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{folder}: not a checkpoint; expected a folder named like step_00001000")
    return int(match[1])


def verify_checkpoint(
    folder: Path,
    *,
    hashes: bool = True,
    report: Callable[[str], Any] = lambda message: None,
    share: Share = share_among_threads,
) -> CheckpointManifest:
    """Compare a checkpoint with its manifest: every file there, sizes and (`hashes`) contents, which `share` reads. A
    file that is not of the checkpoint is reported and left alone.

    Raises:
        CheckpointError: naming the first file that is wrong.
    """
    step = step_of(folder)
    manifest = read_manifest(folder)
    if manifest.step != step:
        raise CheckpointError(f"{folder}: its manifest is of step {manifest.step}")
    for name in verify_files(folder, manifest, hashes=hashes, share=share):
        report(f"{folder}: {name} is not of this checkpoint; left alone")
    return manifest


def newest_valid(
    run_dir: Path, report: Callable[[str], Any], share: Share = share_among_threads, *, hashes: bool = True
) -> Path | None:
    """The newest checkpoint that agrees with its manifest; each one skipped is reported with the reason.

    Raises:
        CheckpointError: there are checkpoints, and none is valid: starting anew is for the user to decide.
    """
    folders = list_checkpoints(run_dir)
    for folder in reversed(folders):
        try:
            verify_checkpoint(folder, hashes=hashes, report=report, share=share)
        except CheckpointError as error:
            report(f"checkpoint skipped: {error}")
        else:
            return folder
    if folders:
        raise CheckpointError(
            f"{checkpoints_folder(run_dir)}: {len(folders)} checkpoints and none is valid; repair or remove them, "
            "or start anew with another --run-dir"
        )
    return None


def find_checkpoint(
    path: Path, report: Callable[[str], Any], share: Share = share_among_threads, *, hashes: bool = True
) -> Path:
    """A checkpoint compared with its manifest: `path` itself, or the newest valid one of a run, here.

    Raises:
        CheckpointError: it is damaged, or the run holds none.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give a run's, or that of a checkpoint")
    if not checkpoints_folder(path).is_dir():
        verify_checkpoint(path, hashes=hashes, report=report, share=share)
        return path
    found = newest_valid(path, report, share, hashes=hashes)
    if found is None:
        raise CheckpointError(f"{path}: the run has not saved any checkpoint")
    return found


def check_latest(run_dir: Path, newest: Path, report: Callable[[str], Any]) -> None:
    """Report and repair a file `latest` that does not name `newest`. Nothing of ours is loaded by it; tools use it."""
    path = checkpoints_folder(run_dir) / LATEST_NAME
    there = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
    if there != newest.name:
        report(f"{path}: {there[:80] or 'empty'!r} instead of {newest.name}; corrected")
        point_latest(run_dir, newest)


def point_latest(run_dir: Path, folder: Path) -> None:
    """Name `folder` in the file `latest`, which DeepSpeed's own tools read."""
    replace_file(checkpoints_folder(run_dir) / LATEST_NAME, folder.name)
