"""Manage a run's checkpoints: list, verify, prune, compare, convert, average: the command.

python -m minimind.checkpoint list|verify|prune RUN
python -m minimind.checkpoint diff A B | convert STEP | average STEP... --output DIR
"""

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from minimind.checkpoints.folder import find_checkpoint
from minimind.checkpoints.formats.averaging import write_average
from minimind.checkpoints.formats.portable import convert
from minimind.checkpoints.inspect import diff, find_damages, list_run, run_checkpoints, verify_all
from minimind.checkpoints.retention import prune, remove_checkpoint
from minimind.cli import parse_flags
from minimind.errors import UserError, run_main
from minimind.training.run_lock import hold_run_folder


@dataclass(frozen=True)
class List:
    """List the checkpoints of a run; files and sizes are checked, contents are not."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""


@dataclass(frozen=True)
class Verify:
    """Compare every byte with the manifest; exit code 1 if anything is damaged."""

    path: tyro.conf.Positional[Path]
    """A run's folder, or one checkpoint."""


@dataclass(frozen=True)
class Prune:
    """Delete old checkpoints of a run that no job is using."""

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
    """Only print what would be deleted."""


@dataclass(frozen=True)
class Diff:
    """Compare two checkpoints of any ranks and stages, tensor by tensor; exit code 1 if they differ."""

    a: tyro.conf.Positional[Path]
    """A checkpoint, or a run's folder for its newest."""
    b: tyro.conf.Positional[Path]
    """The other one."""
    optimizer: bool = False
    """Compare the optimizer's state too."""


@dataclass(frozen=True)
class Convert:
    """Write the weights and the optimizer's state in float32 as safetensors files, beside the checkpoint."""

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
    """Run the command; returns the exit code."""
    args = sys.argv[1:] if args is None else args
    command = parse_flags(Command, args, prog="python -m minimind.checkpoint")  # type: ignore[arg-type, var-annotated]
    if isinstance(command, List):
        return list_run(command.run)
    if isinstance(command, Verify):
        return verify_all(command.path)
    if isinstance(command, Prune):
        return prune_run(command)
    if isinstance(command, Diff):
        return diff(_find(command.a), _find(command.b), optimizer=command.optimizer)
    if isinstance(command, Convert):
        print(f"wrote {convert(_find(command.path))}")
        return 0
    write_average([_find(path) for path in command.paths], command.output)
    print(f"wrote {command.output}")
    return 0


def _find(path: Path) -> Path:
    return find_checkpoint(path, lambda message: print(message, file=sys.stderr))


def prune_run(command: Prune) -> int:
    """Delete, or with `dry_run` name, what the rules of retention give up."""
    if command.keep_last < 1:
        raise UserError(f"keep_last: {command.keep_last} is below 1; the newest checkpoint always stays")
    folders = run_checkpoints(command.run)
    with contextlib.nullcontext() if command.dry_run else hold_run_folder(command.run):
        damages = find_damages(folders)
        damaged = [folder for folder in folders if command.damaged and damages[folder]]
        for folder in [] if command.dry_run else damaged:
            remove_checkpoint(folder)
        expired = prune(
            command.run,
            keep_last=command.keep_last,
            keep_every=command.keep_every,
            keep_best=command.keep_best,
            # Newer ones of the right sizes but with a flipped bit must not push it out.
            newest_valid=next((folder for folder in reversed(folders) if not damages[folder]), None),
            dry_run=command.dry_run,
        )
    for folder in [*damaged, *expired]:
        print(f"{'would delete' if command.dry_run else 'deleted'} {folder}")
    return 0


if __name__ == "__main__":
    run_main(main)
