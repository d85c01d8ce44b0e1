"""Which learning rate, and which batch? `python -m minimind.tune --shards DIR --model NAME --minutes 10`

Short runs of the trainer as its flags say, with the rates doubled and halved; prints a table and a recommendation, and
writes tune.json and the curve tune.png.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from minimind.checkpoints.formats.source import open_source
from minimind.cli import parse_flags
from minimind.config.command_line import Selection, read_selection
from minimind.config.run_config import DataConfig, RunConfig, TrainConfig, check_run
from minimind.errors import run_main
from minimind.files import disk_errors, replace_file
from minimind.model.config import ModelConfig
from minimind.reports.tune import Tuner, draw_trials, show_trials
from minimind.schema import ABOVE_0

PROGRAM = "python -m minimind.tune"


@dataclass(frozen=True)
class _Options:
    """Flags beside those of training."""

    minutes: Annotated[float, ABOVE_0] = 10.0
    """Time for all runs together."""
    output: Path = Path("tune")
    """Folder for tune.json and tune.png."""


@dataclass(frozen=True)
class _Flags:
    """Find the learning rate and the batch of a training run by short runs on this device."""

    options: Annotated[_Options, tyro.conf.arg(name="")]
    selection: Annotated[Selection, tyro.conf.arg(name="")]
    data: Annotated[DataConfig, tyro.conf.arg(name="")]
    train: Annotated[TrainConfig, tyro.conf.arg(name="")]
    fields: Annotated[ModelConfig, tyro.conf.arg(name="")]


def main(args: Sequence[str] | None = None) -> int:
    """Run the trials, print what they say, write the files."""
    began, args = time.perf_counter(), sys.argv[1:] if args is None else args
    selection, base = read_selection(args, PROGRAM, lambda place: open_source(Path(place), hashes=False).config)
    flags = parse_flags(
        _Flags, args, default=_Flags(_Options(), selection, base.data, base.train, base.model), prog=PROGRAM
    )
    run = RunConfig(model=flags.fields, data=flags.data, train=flags.train)
    check_run(run)
    tuner = Tuner(run, began + 60 * flags.options.minutes)
    tuner.search()
    print("\n" + show_trials(tuner))
    folder = flags.options.output
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "tune.json", json.dumps(tuner.to_dicts(), indent=1) + "\n")
        replace_file(folder / "tune.png", draw_trials(tuner))
    return 0


if __name__ == "__main__":
    run_main(main)
