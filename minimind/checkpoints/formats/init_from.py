"""--init-from: copy the weights of another model into one that is about to be trained, before DeepSpeed wraps it.

The optimizer starts fresh.
"""

from pathlib import Path

import deepspeed
import torch

from minimind.checkpoints.formats.layout import own_shapes
from minimind.checkpoints.formats.source import ModelSource, open_source
from minimind.errors import UserError
from minimind.model import MiniMindForCausalLM, ModelConfig
from minimind.parallel.experts import own_experts


def check_init_checkpoint(config: ModelConfig, folder: Path) -> ModelSource:
    """The model at `folder`, which must have the tensors of `config`.

    Raises:
        UserError: it is missing, damaged, or of another shape; the message names the first tensor that differs.
    """
    source = open_source(folder)
    wanted = own_shapes(config)
    for name in sorted(wanted.keys() | source.shapes.keys()):
        there, here = (shapes.get(name, "not at all") for shapes in (source.shapes, wanted))
        if there != here:
            raise UserError(
                f"init_from: {folder} has {name} {there}, the model of this run {here}; leave out --model and the "
                "flags of its shape"
            )
    return source


@torch.no_grad()
def load_init_checkpoint(model: MiniMindForCausalLM, folder: Path) -> None:
    """Copy every tensor of `folder` into `model`. Every rank calls this, and each reads every tensor."""
    source = check_init_checkpoint(model.config, folder)
    targets = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in source.shapes:
        target = targets[name]
        # Under zero.Init a parameter is one rank's slice; every rank fills the gathered whole with the same numbers.
        if hasattr(target, "ds_tensor"):
            with deepspeed.zero.GatheredParameters([target], modifier_rank=0):
                target.copy_(source.read(name))
        else:
            # Beside other ranks of its group, a rank has its own experts alone.
            target.copy_(own_experts(source.read(name), len(target)))
