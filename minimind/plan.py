"""Before a run: will it fit, how long will it take, what will it cost. `python -m minimind.plan --model NAME ...`

Takes every flag of training beside its own, resolves the run as training would for the ranks that are planned, and
prints arithmetic. Touches no device, unless `--find-micro-batch` asks for real steps.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from minimind.checkpoints.formats.source import open_source
from minimind.cli import parse_flags
from minimind.config.command_line import Selection, read_selection
from minimind.config.deepspeed_file import load_ds_config
from minimind.config.run_config import DataConfig, RunConfig, TrainConfig, check_run
from minimind.errors import run_main
from minimind.model.config import ModelConfig
from minimind.reports.plan.compute_optimal import show_compute_optimal
from minimind.reports.plan.micro_batch import find_micro_batch
from minimind.reports.plan.mixture import show_mixtures
from minimind.reports.plan.planned_run import PlanOptions, check_options, make_plan
from minimind.reports.plan.table import show_plan
from minimind.units import parse_size

PROGRAM = "python -m minimind.plan"


@dataclass(frozen=True)
class _Flags:
    """Plan a training run: memory in every ZeRO stage, the largest micro-batch, time, cost, disk, advice."""

    plan: Annotated[PlanOptions, tyro.conf.arg(name="")]
    selection: Annotated[Selection, tyro.conf.arg(name="")]
    data: Annotated[DataConfig, tyro.conf.arg(name="")]
    train: Annotated[TrainConfig, tyro.conf.arg(name="")]
    fields: Annotated[ModelConfig, tyro.conf.arg(name="")]


def main(args: Sequence[str] | None = None) -> int:
    """Print the plan; gives the exit code: 1 where the run does not fit."""
    args = sys.argv[1:] if args is None else args
    selection, base = read_selection(args, PROGRAM, lambda place: open_source(Path(place), hashes=False).config)
    default = _Flags(PlanOptions(), selection, base.data, base.train, base.model)
    flags = parse_flags(_Flags, args, default=default, prog=PROGRAM)
    # --device is a flag of the run, too; "auto" is planned as a GPU.
    device: Literal["gpu", "cpu"] = "cpu" if flags.train.device == "cpu" else "gpu"
    options = check_options(dataclasses.replace(flags.plan, device=device))
    run = RunConfig(model=flags.fields, data=flags.data, train=flags.train)
    check_run(run)
    if options.compute_optimal is not None:
        print(show_compute_optimal(run, options))
        return 0
    ds = load_ds_config(run.train.ds_config)
    if options.find_micro_batch:
        limit = parse_size(options.gpu_memory, "gpu_memory", memory=True) if options.gpu_memory else None
        find_micro_batch(run, ds, limit, num_ranks=options.num_gpus)
        return 0
    if options.propose:
        text, fits = show_mixtures(run, ds, options)
        print(text)
        return 0 if fits else 1
    plan = make_plan(run, ds, options)
    print(show_plan(plan))
    return 0 if plan.own.memory.total <= plan.limit else 1


if __name__ == "__main__":
    run_main(main)
