"""Turn a DeepSpeed checkpoint into the portable form."""

from pathlib import Path

import torch

from minimind.checkpoints.consolidate import TrainingCheckpoint
from minimind.checkpoints.formats.load_model import build_from_source
from minimind.checkpoints.formats.source import ModelSource
from minimind.checkpoints.portable import PortableCheckpoint, make_portable
from minimind.checkpoints.zero_partitions import WEIGHT
from minimind.model.config import ModelConfig
from minimind.parallel.expert_names import EnginePart


def convert(folder: Path) -> Path:
    """Make a checkpoint's portable form and prove it: a model of it computes what the engine computed."""
    made, checkpoint = make_portable(folder), TrainingCheckpoint(folder)
    portable = PortableCheckpoint(made)
    buffers = checkpoint.buffers()

    def read(name: str) -> torch.Tensor:
        part = EnginePart(name, ())
        return portable.read_buffer(part) if name in buffers else portable.read(part, WEIGHT)

    shapes = {**checkpoint.shapes, **{name: tuple(buffer.shape) for name, buffer in buffers.items()}}
    config = ModelConfig.from_dict(checkpoint.manifest.model)
    build_from_source(ModelSource(made, config, shapes, read, None, checkpoint))
    return made
