"""The manifest of a checkpoint folder: its files with size and sha256, and whether they agree with it.

A checkpoint is `checkpoints/step_XXXXXXXX/`. The manifest carries its own sha256 and is written before the folder gets
that name: a folder without a manifest, or that disagrees with it, is damaged.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from minimind.distributed.share import Share, share_among_threads
from minimind.errors import UserError
from minimind.files import hash_file
from minimind.schema import check_fields

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
CLIENT_STATE_KEY = "minimind"
"""Key of our own state in DeepSpeed's files."""
# Stands in the manifest for its own sha256 while that is computed.
_NO_SEAL = "0" * 64


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another run."""


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint: path relative to its folder, size in bytes, sha256 in hexadecimal."""

    path: str
    size: int
    sha256: str

    @classmethod
    def of(cls, folder: Path, path: Path) -> "FileRecord":
        """The record of a file below `folder` that is on the disk."""
        return cls(path.relative_to(folder).as_posix(), path.stat().st_size, hash_file(path))


@dataclasses.dataclass(frozen=True)
class TrainState:
    """Progress of a run. Global figures only: anything of one rank is derived from them."""

    step: int = 0
    consumed_samples: int = 0
    tokens_seen: int = 0
    data_start_step: int = 0
    """Steps done when the present shards came in: 0, or where --allow-data-change was first used with them."""
    data_start_windows: Mapping = dataclasses.field(default_factory=dict)
    """Windows of each source, by fingerprint, that had been taken then."""
    windows_taken: Mapping = dataclasses.field(default_factory=dict)
    """The same at this step: where each source goes on if the shards change now."""


@dataclasses.dataclass(frozen=True)
class CheckpointManifest(TrainState):
    """What a checkpoint is, readable without loading it."""

    world_size: int = 1
    zero_stage: int = 0
    ep_size: int = 1
    tp_size: int = 1
    precision: str = "fp32"
    layout: Mapping = dataclasses.field(default_factory=dict)
    """Further settings that decide what DeepSpeed's files look like."""
    shard_fingerprint: str = ""
    tokenizer_sha256: str = ""
    sampling: Mapping = dataclasses.field(default_factory=dict)
    """Settings that decide, beside the shards, which samples a step takes."""
    eval_loss: float | None = None
    """Of an evaluation right before the save, if there was one."""
    probe_loss: float | None = None
    """Of the fixed probe batch, from the engine that was saved."""
    model: Mapping = dataclasses.field(default_factory=dict)
    trained: Mapping = dataclasses.field(default_factory=dict)
    """Where weights are frozen: what is trained (`lora_rank`, ..., `freeze`), and which model has the frozen weights
    (`base`, `base_from_run`, `base_sha256`). Empty: the checkpoint holds the whole model."""
    versions: Mapping = dataclasses.field(default_factory=dict)
    conversion: Mapping = dataclasses.field(default_factory=dict)
    """Of a portable form: what it was made from, and the engine state that is no tensor."""
    files: tuple[FileRecord, ...] = ()
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The text of manifest.json. Its `sha256` is that of this text with 64 zeros in its place."""
        text = json.dumps({"sha256": _NO_SEAL, **dataclasses.asdict(self)}, indent=2) + "\n"
        return text.replace(_NO_SEAL, hashlib.sha256(text.encode()).hexdigest(), 1)


def read_manifest(folder: Path) -> CheckpointManifest:
    """The manifest of a checkpoint folder.

    Raises:
        CheckpointError: it is missing, no JSON, of another format version, or lacks a field.
    """
    path = folder / MANIFEST_NAME
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {MANIFEST_NAME}; it was not saved to its end") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        found = content.get("format_version") if isinstance(content, dict) else content
        raise CheckpointError(f"{path}: format_version {found!r}; this version reads {FORMAT_VERSION}")
    seal = str(content.pop("sha256", ""))
    if not seal or hashlib.sha256(text.replace(seal, _NO_SEAL, 1).encode()).hexdigest() != seal:
        raise CheckpointError(f"{path}: has changed since it was written (its sha256 differs)")
    try:
        files = tuple(FileRecord(**record) for record in content.pop("files"))
        return CheckpointManifest(files=files, **check_fields(CheckpointManifest, content))
    except (KeyError, TypeError, UserError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None


def verify_files(
    folder: Path, manifest: CheckpointManifest, *, hashes: bool = True, share: Share = share_among_threads
) -> list[str]:
    """Compare the files of a folder with a manifest, several at a time. Gives what else lies there (notes of a person,
    what a file system leaves), which harms nothing.

    Args:
        share: who reads the files: the threads of this process, or all ranks.

    Raises:
        CheckpointError: naming the first file that is wrong, or one more that DeepSpeed would take for its own.
    """
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    extra = sorted(found - {MANIFEST_NAME, *(record.path for record in manifest.files)})
    for name in extra:
        if name.endswith("_states.pt"):
            raise CheckpointError(f"{folder}: {name} is not in the manifest: a file of another checkpoint")
    # Sizes first: a file that was cut short need not be found by reading all before it.
    for reads in (False, True) if hashes else (False,):
        by = share if reads else share_among_threads
        for wrong in by(functools.partial(_find_damage, folder, hashes=reads), manifest.files):
            if wrong:
                raise CheckpointError(f"{folder}: {wrong}")
    return extra


def _find_damage(folder: Path, record: FileRecord, *, hashes: bool) -> str | None:
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
