"""A run's figures to Weights & Biases, if asked for; the package is imported only then.

A failure of the service never ends a training.
"""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minimind.errors import UserError
from minimind.training.record.run_files import Record, figures_by_source


def check_wandb(project: str | None) -> None:
    """Refuse a project while the package is missing, before anything is started.

    Raises:
        UserError: wandb is not installed.
    """
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(f"wandb_project: {project} needs the package wandb; pip install wandb, or leave it out")


class WandbLog:
    """One run at Weights & Biases, named after the run folder; a resumed run continues it. Rank 0 only."""

    def __init__(self, project: str, run_dir: Path, settings: Mapping[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        identity = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
        try:
            self._run = wandb.init(
                project=project, name=run_dir.name, id=identity, resume="allow", config=dict(settings), dir=str(run_dir)
            )
        except Exception as error:  # no account, no network: its own words are the best
            raise UserError(f"wandb_project: {project}: {error}; run wandb login, or leave it out") from None
        self._failed = False

    def log(self, record: Record) -> None:
        """Send the figures of one record under its step; the first failure ends the sending."""
        if self._failed:
            return
        try:
            figures = {**record, **figures_by_source(record)}
            self._run.log({k: v for k, v in figures.items() if isinstance(v, (int, float))}, step=record["step"])
        except Exception as error:
            self._failed = True
            print(f"wandb: {error}; no more is sent", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Send the rest."""
        try:
            self._run.finish()
        except Exception as error:
            print(f"wandb: {error}", file=sys.stderr, flush=True)
