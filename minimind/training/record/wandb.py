"""A run's figures to Weights & Biases, for those who ask for it; the package is imported only then.

The run there has an identity made from the run's folder, so a resumed run goes on in it. Rank 0 alone has one. A
failure of the service never ends a training. Knows nothing of what the figures mean.
"""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minimind.errors import UserError


def check_wandb(project: str | None) -> None:
    """Refuse a project while the package is missing, before anything is started.

    Raises:
        UserError: wandb is not installed.
    """
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(f"wandb_project: {project} needs the package wandb; pip install wandb, or leave it out")


class WandbLog:
    """One run at Weights & Biases.

    Args:
        run_dir: gives the name, and the identity.
        settings: the run's configuration, shown there.
    """

    def __init__(self, project: str, run_dir: Path, settings: Mapping[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        identity = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
        self._failed = False
        try:
            self._run = wandb.init(
                project=project, name=run_dir.name, id=identity, resume="allow", config=dict(settings), dir=str(run_dir)
            )
        except Exception as error:  # no account, no network: theirs to say
            raise UserError(f"wandb_project: {project}: {error}; run wandb login, or leave it out") from None

    def log(self, record: Mapping[str, Any]) -> None:
        """Send the figures of one record under its step."""
        if self._failed:
            return
        figures = {name: value for name, value in record.items() if isinstance(value, (int, float))}
        try:
            self._run.log(figures, step=record["step"])
        except Exception as error:  # training is worth more than its curve elsewhere
            self._failed = True
            print(f"wandb: {error}; no more is sent", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Send what is left."""
        try:
            self._run.finish()
        except Exception as error:
            print(f"wandb: {error}", file=sys.stderr, flush=True)
