"""What `minimind.checkpoint` shows: a table of a run's checkpoints, their verification, the difference of two."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from minimind.checkpoints.base import find_base
from minimind.checkpoints.consolidate import TrainingCheckpoint
from minimind.checkpoints.folder import checkpoints_folder, list_checkpoints, portable_folder, verify_checkpoint
from minimind.checkpoints.manifest import MANIFEST_NAME, CheckpointError, CheckpointManifest, read_manifest
from minimind.checkpoints.zero_partitions import WEIGHT
from minimind.errors import UserError
from minimind.units import format_table


def list_run(run: Path) -> int:
    """Print a line for each checkpoint, newest last."""
    rows = [["checkpoint", "size", "tokens", "eval loss", "topology"]]
    for folder in run_checkpoints(run):
        try:
            manifest = verify_checkpoint(folder, hashes=False)
        except CheckpointError as error:
            rows.append([folder.name, "", "", "", f"damaged: {error}"])
            continue
        size = sum(record.size for record in manifest.files)
        loss = "" if manifest.eval_loss is None else f"{manifest.eval_loss:.4f}"
        topology = f"{manifest.world_size} ranks, ZeRO {manifest.zero_stage}, {manifest.precision}"
        topology += f", ep {manifest.ep_size}" if manifest.ep_size > 1 else ""
        topology += f", tp {manifest.tp_size}" if manifest.tp_size > 1 else ""
        topology += "; portable form kept" if portable_folder(folder).exists() else ""
        rows.append([folder.name, f"{size / 1e6:.1f} MB", f"{manifest.tokens_seen:,}", loss, topology])
    print(format_table(rows, "<>>><"))
    return 0


def verify_all(path: Path) -> int:
    """Print for each checkpoint whether it is valid, and whether the frozen weights that it stands on are."""
    damages = find_damages(run_checkpoints(path) if checkpoints_folder(path).is_dir() else [path])
    lacking = {folder: find_lack(folder) for folder, damage in damages.items() if not damage}
    for folder, damage in damages.items():
        lack = f", but {lacking[folder]}" if lacking.get(folder) else ""
        print(f"{folder.name}: damaged: {damage}" if damage else f"{folder.name}: valid{lack}")
    return 1 if any(damages.values()) or any(lacking.values()) else 0


def find_lack(folder: Path) -> str:
    """What is wrong with the frozen weights that a valid checkpoint stands on; "": nothing, or it has all its own."""
    manifest = read_manifest(folder)
    if not manifest.trained:
        return ""
    try:
        base = find_base(folder, manifest)
        if (base / MANIFEST_NAME).is_file():
            verify_checkpoint(base)
            return find_lack(base)
    except UserError as error:
        return str(error)
    return ""


def find_damages(folders: Sequence[Path]) -> dict[Path, str]:
    """How each checkpoint disagrees with its manifest; "": not at all."""
    found = dict.fromkeys(folders, "")
    for folder in folders:
        try:
            verify_checkpoint(folder, report=print)
        except CheckpointError as error:
            found[folder] = str(error)
    return found


def diff(a: Path, b: Path, *, optimizer: bool) -> int:
    """Print in what two checkpoints differ; 1 when they do."""
    first, second = TrainingCheckpoint(a), TrainingCheckpoint(b)
    lines = [*manifest_differences(first.manifest, second.manifest), *tensor_differences(first, second, optimizer)]
    print("\n".join(lines) if lines else "equal")
    return 1 if lines else 0


def manifest_differences(a: CheckpointManifest, b: CheckpointManifest) -> Iterator[str]:
    """Facts about two checkpoints that are not the same."""
    for field in dataclasses.fields(a):
        first, second = getattr(a, field.name), getattr(b, field.name)
        if field.name == "files" or first == second:
            continue
        if isinstance(first, dict):
            for key in sorted(first.keys() | second.keys()):
                if first.get(key) != second.get(key):
                    yield f"{field.name}.{key}: {first.get(key)} | {second.get(key)}"
        else:
            yield f"{field.name}: {first} | {second}"


def tensor_differences(a: TrainingCheckpoint, b: TrainingCheckpoint, optimizer: bool) -> Iterator[str]:
    """Tensors that are not the same, with the largest absolute difference."""
    names = list(dict.fromkeys([*a.shapes, *b.shapes]))
    for name in tqdm(names, unit="tensor", disable=None, leave=False):
        if name not in a.shapes or name not in b.shapes:
            yield f"{name}: only in the {'first' if name in a.shapes else 'second'}"
        elif tuple(a.shapes[name]) != tuple(b.shapes[name]):
            yield f"{name}: shape {tuple(a.shapes[name])} | {tuple(b.shapes[name])}"
        else:
            for key in a.keys_of(name) if optimizer else (WEIGHT,):
                if key not in b.keys_of(name):
                    yield f"{name} {key}: only in the first"
                    continue
                first, second = a.read(name, key), b.read(name, key)
                if not torch.equal(first, second):
                    yield f"{name} {key}: differs by up to {float((first - second).abs().max()):.3g}"


def run_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run. Raises `UserError` where there are none."""
    folders = list_checkpoints(run)
    if not folders:
        raise UserError(f"{run}: no checkpoints in {checkpoints_folder(run)}; give a run's folder")
    return folders
