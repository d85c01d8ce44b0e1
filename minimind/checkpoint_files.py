"""Checkpoint folders on disk: their manifest, whether they are sound, which is the newest, which may go.

A checkpoint is `checkpoints/step_XXXXXXXX/`. Its manifest names every file with size and sha256 and is written before
the folder gets that name, so a folder without one, or that disagrees with it, is damaged. Knows nothing of ranks, of
DeepSpeed or of tensors.
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minimind.atomic import fsync_folder, hash_file, replace_file
from minimind.errors import UserError
from minimind.schema import check_fields

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
LATEST_NAME = "latest"
PARTIAL_SUFFIX = ".partial"
CLIENT_STATE_KEY = "minimind"
"""Under which our own state lies in DeepSpeed's files."""
_NAME = re.compile(r"step_(\d{8,})")


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another run."""


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint: path relative to its folder, size in bytes, sha256 in hexadecimal."""

    path: str
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class CheckpointManifest:
    """What a checkpoint is, readable without loading it."""

    step: int = 0
    consumed_samples: int = 0
    tokens_seen: int = 0
    world_size: int = 1
    zero_stage: int = 0
    ep_size: int = 1
    precision: str = "fp32"
    shard_fingerprint: str = ""
    model: Mapping = dataclasses.field(default_factory=dict)
    versions: Mapping = dataclasses.field(default_factory=dict)
    files: tuple[FileRecord, ...] = ()
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def checkpoint_name(step: int) -> str:
    """`step_00001000` for 1000."""
    return f"step_{step:08d}"


def checkpoints_folder(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run by their names, oldest first; whether they are sound is not looked at."""
    folder = checkpoints_folder(run_dir)
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name.

    Raises:
        CheckpointError: the folder is not named like a checkpoint.
    """
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{folder}: not a checkpoint; expected a folder named like step_00001000")
    return int(match[1])


def read_manifest(folder: Path) -> CheckpointManifest:
    """The manifest of a checkpoint folder.

    Raises:
        CheckpointError: it is missing, no JSON, of another format version, or lacks a field.
    """
    path = folder / MANIFEST_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {MANIFEST_NAME}; it was not saved to its end") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        found = content.get("format_version") if isinstance(content, dict) else content
        raise CheckpointError(f"{path}: format_version {found!r}; this version reads {FORMAT_VERSION}")
    try:
        files = tuple(FileRecord(**record) for record in content.pop("files"))
        return CheckpointManifest(files=files, **check_fields(CheckpointManifest, content, str(path)))
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    except UserError as error:
        raise CheckpointError(str(error)) from None


def list_files(folder: Path) -> list[str]:
    """Paths of all files below `folder`, relative to it and sorted, without the manifest itself."""
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in found if name != MANIFEST_NAME)


def record_file(folder: Path, name: str) -> FileRecord:
    """Flush one file to the disk and hash it."""
    path = folder / name
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return FileRecord(path=name, size=path.stat().st_size, sha256=hash_file(path))


def check_record(folder: Path, record: FileRecord, *, hashes: bool = True) -> str | None:
    """What is wrong with one file, or None."""
    path = folder / record.path
    try:
        size = path.stat().st_size
        if size != record.size:
            return f"{record.path} has {size} bytes instead of {record.size}"
        if hashes and hash_file(path) != record.sha256:
            return f"{record.path} has changed since it was saved (its sha256 differs)"
    except FileNotFoundError:
        return f"{record.path} is missing"
    except OSError as error:
        return f"{record.path} cannot be read: {error.strerror}"
    return None


def verify(folder: Path, *, hashes: bool = True) -> CheckpointManifest:
    """Compare a checkpoint with its manifest: every file there, no other, sizes and (`hashes`) contents.

    Raises:
        CheckpointError: naming the first file that is wrong.
    """
    manifest = read_manifest(folder)
    if manifest.step != step_of(folder):
        raise CheckpointError(f"{folder}: its manifest is of step {manifest.step}")
    extra = set(list_files(folder)) - {record.path for record in manifest.files}
    if extra:
        raise CheckpointError(f"{folder}: {sorted(extra)[0]} is not in the manifest")
    for record in manifest.files:
        wrong = check_record(folder, record, hashes=hashes)
        if wrong:
            raise CheckpointError(f"{folder}: {wrong}")
    return manifest


def newest_sound(run_dir: Path, report: Callable[[str], Any]) -> Path | None:
    """The newest checkpoint that agrees with its manifest; each one passed over is reported with the reason.

    Raises:
        CheckpointError: there are checkpoints, and none is sound: starting anew is for the user to decide.
    """
    folders = list_checkpoints(run_dir)
    for folder in reversed(folders):
        try:
            verify(folder)
        except CheckpointError as error:
            report(f"checkpoint passed over: {error}")
        else:
            return folder
    if folders:
        raise CheckpointError(
            f"{checkpoints_folder(run_dir)}: {len(folders)} checkpoints and none is sound; repair or remove them, "
            "or start anew with another --run-dir"
        )
    return None


def point_latest(run_dir: Path, folder: Path) -> None:
    """Name `folder` in the file `latest`, which DeepSpeed's own tools read."""
    replace_file(checkpoints_folder(run_dir) / LATEST_NAME, folder.name)


def remove_checkpoint(folder: Path) -> None:
    """Take a checkpoint away so that it never looks whole while it is half gone: rename first, then delete."""
    doomed = folder.with_name(folder.name + PARTIAL_SUFFIX)
    if folder != doomed:
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
        fsync_folder(folder.parent)
    shutil.rmtree(doomed)


def prune(run_dir: Path, *, keep_last: int, keep_every: int, protect: frozenset[int] = frozenset()) -> list[Path]:
    """Remove all but the newest `keep_last` (0: all stay), multiples of `keep_every`, and the `protect`ed steps.

    Returns the folders removed. The newest one always stays.
    """
    folders = list_checkpoints(run_dir)
    if keep_last == 0:
        return []
    doomed = [
        folder
        for folder in folders[: -max(1, keep_last)]
        if not (keep_every and step_of(folder) % keep_every == 0) and step_of(folder) not in protect
    ]
    for folder in doomed:
        remove_checkpoint(folder)
    return doomed


def remove_partials(run_dir: Path) -> list[Path]:
    """Remove what a run that died while saving has left."""
    folder = checkpoints_folder(run_dir)
    left = [path for path in folder.glob(f"step_*{PARTIAL_SUFFIX}") if path.is_dir()] if folder.is_dir() else []
    for path in left:
        shutil.rmtree(path)
    return left
