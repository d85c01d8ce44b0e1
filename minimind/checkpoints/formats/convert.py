"""Write the portable form of a DeepSpeed checkpoint, and check it."""

from pathlib import Path

from torch import Tensor

from minimind.checkpoints.formats.load_model import build_from_source
from minimind.checkpoints.formats.source import open_checkpoint
from minimind.checkpoints.portable import BUFFERS, PortableCheckpoint, make_portable
from minimind.checkpoints.zero_partitions import WEIGHT
from minimind.parallel.expert_names import EnginePart


def convert(folder: Path) -> Path:
    """Make a checkpoint's portable form. Building a model from it compares the probe loss with the engine's."""
    made = make_portable(folder)
    portable = PortableCheckpoint(made)

    def read(name: str) -> Tensor:
        part = EnginePart(name, ())
        return portable.read(part, BUFFERS if name in portable.names[BUFFERS] else WEIGHT)

    build_from_source(open_checkpoint(folder, read=read))
    return made
