"""--init-from: copy the weights of another model into one that is about to be trained, before DeepSpeed wraps it.

The optimizer starts fresh. Tokens that the other model lacks start at the mean of its own. Rank 0 alone compares
hashes; the other ranks read the very files that it has seen.
"""

from collections.abc import Collection
from pathlib import Path

import deepspeed
import torch

from minimind.checkpoints.base import hash_weights
from minimind.checkpoints.formats.layout import own_shapes
from minimind.checkpoints.formats.source import ModelSource, open_source
from minimind.config.resolved_run import FrozenBase
from minimind.errors import UserError
from minimind.model import MiniMindForCausalLM, ModelConfig
from minimind.model.pretrained import TIED_NAME
from minimind.parallel.experts import own_experts

_TOKEN_MATRICES = ("model.embed_tokens.weight", TIED_NAME)


def check_init_checkpoint(
    config: ModelConfig, path: Path, trained: Collection[str] | None = None, *, hashes: bool = False
) -> ModelSource:
    """The model at `path`, which must have the tensors of `config`, but for tokens that are new.

    Args:
        trained: names of the parameters that are trained, if not all: new tokens need a trained matrix.

    Raises:
        UserError: it is missing, damaged, or of another shape; the message names the first tensor that differs.
    """
    source = open_source(path, hashes=hashes)
    wanted = own_shapes(config)
    for name in sorted(wanted.keys() | source.shapes.keys()):
        there, here = (shapes.get(name, "not at all") for shapes in (source.shapes, wanted))
        new = config.vocab_size - source.config.vocab_size
        is_grown = name in _TOKEN_MATRICES and new > 0 and there[1:] == here[1:]
        if is_grown and trained is not None and name not in trained:
            raise UserError(
                f"init_from: {path} has {source.config.vocab_size:,} tokens, this run {config.vocab_size:,}, and "
                f"{name} is frozen: rows of new tokens must be trained; train them first, or --freeze something else"
            )
        if there != here and not is_grown:
            raise UserError(
                f"init_from: {path} has {name} {there}, the model of this run {here}; leave out --model and the "
                "flags of its shape"
            )
    return source


def describe_changes(there: ModelConfig, here: ModelConfig) -> str | None:
    """What a run changes of the model that it begins with, beside new tokens, in one line; None: nothing."""
    new = here.to_dict()
    changes = [
        f"{name} {value} -> {new[name]}"
        for name, value in there.to_dict().items()
        if value != new[name] and name != "vocab_size"
    ]
    return f"the model of init_from is changed: {', '.join(changes)}" if changes else None


def find_init_checkpoint(config: ModelConfig, path: Path, *, keeps_frozen: bool) -> FrozenBase:
    """Which model `path` is at this moment, its files compared with their hashes. One rank calls this.

    Args:
        keeps_frozen: weights stay in it, so its sha256 is needed.
    """
    place = check_init_checkpoint(config, path, hashes=True).place.resolve()
    return FrozenBase(str(place), hash_weights(place) if keeps_frozen else "")


@torch.no_grad()
def load_init_checkpoint(model: MiniMindForCausalLM, path: Path) -> int:
    """Copy every tensor of `path`, which has been verified, into `model`; how many tokens are new. Every rank calls
    this, and each reads every tensor."""
    source = check_init_checkpoint(model.config, path)
    num_new = model.config.vocab_size - source.config.vocab_size
    targets = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in source.shapes:
        target, value = targets[name], source.read(name)
        if name in _TOKEN_MATRICES and num_new:
            # As likely as any other token at first: a random row would be far from all of them.
            mean = value.float().mean(0, keepdim=True).to(value.dtype)
            value = torch.cat([value, mean.expand(num_new, -1)])
        # Under zero.Init a parameter is one rank's slice; every rank fills the gathered whole with the same numbers.
        if hasattr(target, "ds_tensor"):
            with deepspeed.zero.GatheredParameters([target], modifier_rank=0):
                target.copy_(value)
        else:
            # Beside other ranks of its group, a rank has its own experts alone.
            target.copy_(own_experts(value, len(target)))
    return num_new
