"""The command line of a run: flags from the fields of `RunConfig`, over the defaults of `--config FILE`."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from minimind.cli import parse_flags, parse_known_flags
from minimind.config.run_config import (
    SHARD_FINGERPRINT,
    SOURCE_FINGERPRINTS,
    DataConfig,
    RunConfig,
    TrainConfig,
    _default,
    check_run,
    preset,
)
from minimind.errors import UserError
from minimind.files import read_json
from minimind.model.config import ModelConfig
from minimind.model.presets import PRESETS

PROGRAM = "python -m minimind.train"
_MODEL_HELP = f"Model preset, one of {', '.join(PRESETS)}; any field of the model below overrides it."


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line."""

    run: RunConfig
    dry_run: bool


@dataclass(frozen=True)
class Selection:
    """Flags that choose the defaults of the other flags, read in a first pass."""

    config: Annotated[str | None, _default("none")] = None
    """JSON file with defaults, such as the run_config.json of another run; flags override it."""
    model: Annotated[str | None, _default("minimind3", _MODEL_HELP)] = None


@dataclass(frozen=True)
class _Start:
    """Read in the first pass too: it chooses the defaults of the model's flags."""

    init_from: str | None = None


@dataclass(frozen=True)
class _Flags:
    """Train a MiniMind language model under DeepSpeed."""

    selection: Annotated[Selection, tyro.conf.arg(name="")]
    data: Annotated[DataConfig, tyro.conf.arg(name="")]
    train: Annotated[TrainConfig, tyro.conf.arg(name="")]
    fields: Annotated[ModelConfig, tyro.conf.arg(name="")]
    dry_run: bool = False
    """Print the resolved run, its size and its memory, and exit."""


def parse_command_line(args: Sequence[str], read_model: Callable[[str], ModelConfig] | None = None) -> CommandLine:
    """Flags and, under them, the file of `--config`, as one run configuration.

    Args:
        read_model: gives the config of the model that `--init-from` names; None: of this project's own form alone.

    Raises:
        UserError: unknown flag, field or preset, a wrong type, or a file that is no JSON.
        SystemExit: code 0 after `--help`.
    """
    selection, base = read_selection(args, PROGRAM, read_model)
    default = _Flags(selection=selection, data=base.data, train=base.train, fields=base.model)
    flags = parse_flags(_Flags, args, default=default, prog=PROGRAM)
    run = RunConfig(model=flags.fields, data=flags.data, train=flags.train)
    check_run(run)
    return CommandLine(run=run, dry_run=flags.dry_run)


def read_selection(
    args: Sequence[str], program: str, read_model: Callable[[str], ModelConfig] | None = None
) -> tuple[Selection, RunConfig]:
    """The flags `--config` and `--model`, and the run that they name: the defaults of every other flag.

    Raises:
        UserError: no such preset, or a file that is no run configuration.
    """
    selection = parse_known_flags(Selection, args, default=Selection(), prog=program)
    base = RunConfig()
    if selection.config is not None:
        content = read_json(selection.config, "--config")
        if isinstance(content, dict):
            content.pop(SHARD_FINGERPRINT, None)
            content.pop(SOURCE_FINGERPRINTS, None)
        base = RunConfig.from_dict(content, where=selection.config)
    start = parse_known_flags(_Start, args, default=_Start(), prog=program).init_from
    if selection.model is not None:
        base = dataclasses.replace(base, model=preset(selection.model))
    elif start is not None:
        base = dataclasses.replace(base, model=(read_model or _model_of)(start))
    return selection, base


def _model_of(folder: str) -> ModelConfig:
    """The config of a model's folder in this project's own form."""
    path = Path(folder) / "config.json"
    values = read_json(path, "init_from:")
    if not isinstance(values, dict) or values.pop("model_type", None) != "minimind":
        raise UserError(
            f"init_from: {folder} is not in this project's own form; make such a folder with python -m minimind.export "
            f"--checkpoint {folder} --output DIR --format minimind"
        )
    return ModelConfig.from_dict(values)
