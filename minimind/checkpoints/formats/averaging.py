"""Average the weights of training checkpoints into an exported folder.

The mean of the last checkpoints often generalises better than any of them (Izmailov et al., arXiv:1803.05407). One
tensor of each is in memory at a time.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from minimind.checkpoints.formats.export import ExportFlags, export
from minimind.checkpoints.formats.load_model import find_tokenizer_file
from minimind.checkpoints.formats.source import open_checkpoint
from minimind.checkpoints.manifest import CheckpointError
from minimind.errors import UserError


def write_average(folders: Sequence[Path], output: Path) -> None:
    """Write the mean float32 weights of verified checkpoints, or those of one, as an exported folder (atomic).

    Raises:
        CheckpointError: the checkpoints are of different models.
        UserError: `output` exists, or cannot be written.
    """
    if not folders:
        raise UserError("paths: no checkpoint given; name one or more")
    if output.exists():
        raise UserError(f"output: {output} exists already; name a new folder")
    first, *others = sources = [open_checkpoint(path, find_tokenizer_file(path.parent.parent)) for path in folders]
    for other in others:
        here, there = first.config.to_dict(), other.config.to_dict()
        if differing := [name for name in here if here[name] != there[name]]:
            steps = f"{first.where.name} and {other.where.name}"
            raise CheckpointError(f"checkpoints {steps}: different models: {', '.join(differing)}")

    def mean(name: str) -> torch.Tensor:
        return torch.stack([source.read(name).double() for source in sources]).mean(0).float()

    export(replace(first, read=mean), ExportFlags(checkpoint=first.where, output=output, format="minimind"))
