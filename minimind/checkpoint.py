"""A run's checkpoints from the command line: look at them, check them, compare, thin out, convert, average.

    python -m minimind.checkpoint list|verify|prune RUN
    python -m minimind.checkpoint diff A B | convert STEP | average STEP... --output DIR

Every rule about checkpoints is elsewhere; this prints. Needs no DeepSpeed.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from tqdm import tqdm

from minimind.checkpoints.formats.averaging import write_average
from minimind.checkpoints.manifest import (
    CheckpointError,
    CheckpointManifest,
    checkpoints_folder,
    list_checkpoints,
    neutral_folder,
    newest_sound,
    verify,
)
from minimind.checkpoints.retention import choose_doomed, prune, remove_checkpoint
from minimind.checkpoints.consolidate import TrainingCheckpoint
from minimind.errors import UserError, run_main
from minimind.parallel.expert_names import Part
from minimind.cli import parse_flags
from minimind.model.config import ModelConfig
from minimind.checkpoints.formats.source import ModelSource
from minimind.checkpoints.portable import NeutralCheckpoint, make_neutral
from minimind.checkpoints.zero_partitions import WEIGHT
from minimind.checkpoints.formats.load_model import build_model, prove
from minimind.training.run_lock import hold_run_folder


@dataclass(frozen=True)
class List:
    """Show the checkpoints of a run; whether their files are there in full is looked at, not their contents."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""


@dataclass(frozen=True)
class Verify:
    """Compare every byte with the manifest; exit code 1 when anything is damaged."""

    path: tyro.conf.Positional[Path]
    """A run's folder, or one checkpoint."""


@dataclass(frozen=True)
class Prune:
    """Delete old checkpoints of a run that no job works on."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    keep_last: int = 3
    """Newest checkpoints to keep, at least 1."""
    keep_every: int = 0
    """Keep multiples of this step; 0: none."""
    keep_best: int = 1
    """Keep this many with the lowest evaluation loss."""
    damaged: bool = False
    """Delete damaged checkpoints too."""
    dry_run: bool = False
    """Only say what would go."""


@dataclass(frozen=True)
class Diff:
    """Compare two checkpoints, whatever they were saved by, tensor by tensor; exit code 1 when they differ."""

    a: tyro.conf.Positional[Path]
    """A checkpoint, or a run's folder for its newest."""
    b: tyro.conf.Positional[Path]
    """The other one."""
    optimizer: bool = False
    """Compare the optimizer's state too."""


@dataclass(frozen=True)
class Convert:
    """Make the topology-free form of a checkpoint, which a resume on other ranks, another ZeRO stage or ep size makes
    by itself."""

    path: tyro.conf.Positional[Path]
    """A checkpoint, or a run's folder for its newest."""


@dataclass(frozen=True)
class Average:
    """Write the mean of the weights of checkpoints (or those of one) as an exported folder."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Checkpoints of one model."""
    output: Path
    """The folder to make."""


Command = (
    Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Prune, tyro.conf.subcommand("prune")]
    | Annotated[Diff, tyro.conf.subcommand("diff")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Average, tyro.conf.subcommand("average")]
)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; gives the exit code."""
    args = sys.argv[1:] if args is None else args
    command = parse_flags(Command, args, prog="python -m minimind.checkpoint")  # type: ignore[arg-type, var-annotated]
    if isinstance(command, List):
        return list_run(command.run)
    if isinstance(command, Verify):
        return verify_all(command.path)
    if isinstance(command, Prune):
        return prune_run(command)
    if isinstance(command, Diff):
        return diff(sound_checkpoint(command.a), sound_checkpoint(command.b), optimizer=command.optimizer)
    if isinstance(command, Convert):
        print(convert(sound_checkpoint(command.path)))
        return 0
    write_average([sound_checkpoint(path) for path in command.paths], command.output)
    print(f"wrote {command.output}")
    return 0


def list_run(run: Path) -> int:
    """Print a line for each checkpoint, newest last."""
    print(f"{'checkpoint':<15} {'size':>9} {'tokens':>15} {'eval loss':>9}  topology")
    for folder in run_checkpoints(run):
        try:
            manifest = verify(folder, hashes=False)
        except CheckpointError as error:
            print(f"{folder.name:<15} damaged: {error}")
            continue
        size = sum(record.size for record in manifest.files)
        loss = "" if manifest.eval_loss is None else f"{manifest.eval_loss:.4f}"
        converted = "; topology-free form kept" if neutral_folder(folder).exists() else ""
        print(
            f"{folder.name:<15} {size / 1e6:>6.1f} MB {manifest.tokens_seen:>15,} {loss:>9}  "
            f"{describe_topology(manifest)}{converted}"
        )
    return 0


def describe_topology(manifest: CheckpointManifest) -> str:
    """`2 ranks, ZeRO 1, bf16`."""
    experts = f", ep {manifest.ep_size}" if manifest.ep_size > 1 else ""
    return f"{manifest.world_size} ranks, ZeRO {manifest.zero_stage}, {manifest.precision}{experts}"


def verify_all(path: Path) -> int:
    """Print for each checkpoint whether it is sound."""
    folders = run_checkpoints(path) if checkpoints_folder(path).is_dir() else [path]
    damaged = 0
    for folder in folders:
        try:
            manifest = verify(folder)
            print(f"{folder.name}: sound ({len(manifest.files)} files)")
        except CheckpointError as error:
            damaged += 1
            print(f"{folder.name}: damaged: {error}")
    return 1 if damaged else 0


def prune_run(command: Prune) -> int:
    """Delete, or with `dry_run` name, what the rules of retention give up."""
    if command.keep_last < 1:
        raise UserError(f"keep_last: {command.keep_last} is below 1; the newest checkpoint always stays")
    folders = run_checkpoints(command.run)
    rules: dict[str, Any] = {
        "keep_last": command.keep_last,
        "keep_every": command.keep_every,
        "keep_best": command.keep_best,
    }
    with contextlib.ExitStack() as stack:
        if not command.dry_run:
            stack.enter_context(hold_run_folder(command.run))
        damaged = [folder for folder in folders if command.damaged and is_damaged(folder)]
        for folder in damaged:
            if not command.dry_run:
                remove_checkpoint(folder)
        # Newer ones of the right sizes but with a flipped bit must not push it out.
        sound = next((folder for folder in reversed(folders) if not is_damaged(folder)), None)
        choose = choose_doomed if command.dry_run else prune
        doomed = choose(command.run, **rules, sound=sound)
        word = "would delete" if command.dry_run else "deleted"
        for folder in [*damaged, *doomed]:
            print(f"{word} {folder}")
    return 0


def is_damaged(folder: Path) -> bool:
    """Whether a checkpoint disagrees with its manifest."""
    try:
        verify(folder)
    except CheckpointError:
        return True
    return False


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


def convert(folder: Path) -> Path:
    """Make a checkpoint's topology-free form and prove it: a model of it computes what the engine computed."""
    made, checkpoint = make_neutral(folder), TrainingCheckpoint(folder)
    neutral = NeutralCheckpoint(made)
    buffers = checkpoint.buffers()

    def read(name: str) -> torch.Tensor:
        part = Part(name, ())
        return neutral.read_buffer(part) if name in buffers else neutral.read(part, WEIGHT)

    shapes = {**checkpoint.shapes, **{name: tuple(buffer.shape) for name, buffer in buffers.items()}}
    config = ModelConfig.from_dict(checkpoint.manifest.model)
    prove(build_model(ModelSource(made, config, shapes, read, None)), checkpoint)
    return made


def run_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run. Raises `UserError` where there are none."""
    folders = list_checkpoints(run)
    if not folders:
        raise UserError(f"{run}: no checkpoints in {checkpoints_folder(run)}; give a run's folder")
    return folders


def sound_checkpoint(path: Path) -> Path:
    """A checkpoint compared with its manifest: `path` itself, or the newest sound one of a run."""
    if checkpoints_folder(path).is_dir():
        found = newest_sound(path, lambda message: print(message, file=sys.stderr))
        if found is None:
            raise UserError(f"{path}: the run has not saved any checkpoint")
        return found
    verify(path)
    return path


if __name__ == "__main__":
    run_main(main)
