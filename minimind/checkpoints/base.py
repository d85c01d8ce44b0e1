"""The model whose frozen weights a checkpoint does not hold: which one, by the sha256 of its weights, and where.

A training checkpoint is known by its manifest, which seals all its files; other forms by their files of weights.
"""

import hashlib
import os
from pathlib import Path

from minimind.checkpoints.manifest import MANIFEST_NAME, CheckpointError, CheckpointManifest
from minimind.config.resolved_run import FrozenBase
from minimind.errors import UserError
from minimind.files import hash_file

_WEIGHTS = (".safetensors", ".pth", ".pt")


def hash_weights(path: Path) -> str:
    """The sha256 by which a model on disk is known: a checkpoint's folder, an export, or a file of weights.

    Raises:
        UserError: there are no weights, or they cannot be read.
    """
    try:
        if path.is_file():
            return hash_file(path)
        if (path / MANIFEST_NAME).is_file():
            return hash_file(path / MANIFEST_NAME)
        files = sorted(file for file in path.iterdir() if file.suffix in _WEIGHTS)
        together = hashlib.sha256()
        for file in files:
            together.update(f"{file.name} {hash_file(file)}\n".encode())
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read: {error.strerror}") from None
    if not files:
        raise UserError(f"{path}: no weights in it")
    return together.hexdigest()


def describe_base(base: FrozenBase, run_dir: Path) -> dict[str, str]:
    """What a manifest says of the base of a run."""
    relative = os.path.relpath(base.path, run_dir.resolve())
    return {"base": base.path, "base_from_run": relative, "base_sha256": base.sha256}


def find_base(folder: Path, manifest: CheckpointManifest, *, hashes: bool = True) -> Path:
    """Where the frozen weights of a checkpoint are: where they were, or as far from its run as they were; unchanged,
    where `hashes` are compared.

    Raises:
        CheckpointError: they are not there, or are others now.
    """
    there, sha256 = manifest.trained["base"], manifest.trained["base_sha256"]
    places = [Path(there), Path(os.path.normpath(folder.resolve().parent.parent / manifest.trained["base_from_run"]))]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise CheckpointError(
            f"{folder}: its frozen weights are those of {there}, which is not there; bring it back, or link its new "
            f"place: ln -s NEW {there}"
        )
    if hashes and (now := hash_weights(found)) != sha256:
        raise CheckpointError(
            f"{folder}: its frozen weights are those of {found}, which has changed since (sha256 {now[:12]} instead of "
            f"{sha256[:12]}); bring the old ones back"
        )
    return found
