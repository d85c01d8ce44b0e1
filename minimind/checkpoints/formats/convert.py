"""Turn a DeepSpeed checkpoint into the portable form."""

from pathlib import Path

import torch

from minimind.checkpoints.consolidate import TrainingCheckpoint
from minimind.checkpoints.formats.load_model import build_from_source
from minimind.checkpoints.formats.source import ModelSource
from minimind.checkpoints.portable import NeutralCheckpoint, make_neutral
from minimind.checkpoints.zero_partitions import WEIGHT
from minimind.model.config import ModelConfig
from minimind.parallel.expert_names import Part


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
    build_from_source(ModelSource(made, config, shapes, read, None, checkpoint))
    return made
