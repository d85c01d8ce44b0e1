"""A trained model that computes beside the one in training and never changes: a teacher, or a reference.

It lies whole on every rank, in 8 bits where asked for, or, in a run at ZeRO stage 3, partitioned over the ranks.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn

from minimind.checkpoints.base import hash_weights
from minimind.checkpoints.formats.init_from import load_init_checkpoint
from minimind.checkpoints.formats.load_model import load_model
from minimind.checkpoints.formats.source import open_source
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import DTYPE_NAMES
from minimind.distributed.collectives import log, on_first_rank
from minimind.errors import UserError
from minimind.files import disk_errors, replace_file
from minimind.model import MiniMindForCausalLM
from minimind.model.kernels.apply import apply_kernels
from minimind.model.kernels.packed_weights import quantize_int8
from minimind.model.transformer import CausalLMOutput


class FrozenModel:
    """The model at a path, in the run's precision. Every rank makes it and calls it alike.

    Args:
        name: what it is called in the log.
        int8: round its matrices to 8 bits, on a CPU.

    Raises:
        UserError: it cannot be loaded, or not in 8 bits here.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        resolved: ResolvedRun,
        device: torch.device,
        *,
        int8: bool = False,
    ) -> None:
        self._is_partitioned = resolved.zero.stage == 3 and not int8
        if int8 and device.type != "cpu":
            raise UserError(
                f"{name}_int8: 8-bit weights are multiplied on a CPU alone, and this run is on {device.type}"
            )
        if self._is_partitioned:
            self.model, self._body = _load_partitioned(path, resolved, device)
        else:
            dtype = torch.bfloat16 if int8 else getattr(torch, DTYPE_NAMES[resolved.train.precision])
            self.model, _ = load_model(path, dtype=dtype, device=device)
            self._body = self.model.model
        size = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in self.model.parameters())
        if int8:
            quantize_int8(self.model)
        self.model.requires_grad_(False)
        form = "partitioned over the ranks" if self._is_partitioned else "whole on every rank"
        log(f"{name:<9} {path}: {size:,} parameters, {form}{', matrices in 8 bits' if int8 else ''}")

    @torch.no_grad()
    def hidden_states(self, input_ids: Tensor, position_ids: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """(B, T, hidden_size) of (B, T) token ids, as `MiniMindModel.forward` gives them."""
        return self._body(input_ids, position_ids, cu_seqlens)

    @contextlib.contextmanager
    def head(self) -> Iterator[nn.Module]:
        """The output matrix, whole for as long as this lasts."""
        if not self._is_partitioned:
            yield self.model.lm_head
            return
        with deepspeed.zero.GatheredParameters([self.model.lm_head.weight]):
            yield self.model.lm_head

    @torch.no_grad()
    def __call__(
        self, input_ids: Tensor, labels: Tensor, *, position_ids: Tensor, cu_seqlens: Tensor, loss_reduction: str
    ) -> CausalLMOutput:
        """The loss, as `MiniMindForCausalLM.forward` gives it."""
        states = self.hidden_states(input_ids, position_ids, cu_seqlens)
        with self.head() as head:
            return CausalLMOutput(loss=head(states, labels, loss_reduction))


def keep_weights(record: Path, path: Path, *, is_new: bool) -> str:
    """The sha256 of a model's weights, noted in the file `record` by a new run. Every rank calls this.

    Raises:
        UserError: the run is not new, and they are others now.
    """

    def compare() -> str:
        now = hash_weights(open_source(path).place.resolve())
        before = record.read_text().strip() if record.exists() and not is_new else now
        if before != now:
            raise UserError(
                f"{path}: its weights are others than when this run began ({record}); bring those back, name the very "
                "checkpoint, or begin anew with --resume never"
            )
        with disk_errors(record):
            record.parent.mkdir(parents=True, exist_ok=True)
            replace_file(record, now + "\n")
        return now

    return on_first_rank(compare)


def _load_partitioned(path: Path, resolved: ResolvedRun, device: torch.device) -> tuple[MiniMindForCausalLM, Any]:
    """The model, each weight on all ranks together, and DeepSpeed's engine of all of it but the output matrix."""
    config = open_source(path).config
    ours, precision = resolved.ds.get("zero_optimization", {}), resolved.train.precision
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3} | {key: value for key, value in ours.items() if key.startswith("stage3_")},
        **{name: {"enabled": precision == name} for name in ("bf16", "fp16")},
    }
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = MiniMindForCausalLM(config)
    load_init_checkpoint(model, path)
    for block in model.model.layers:  # gathered as a whole: which experts are used differs from rank to rank
        set_z3_leaf_module(block, True)
    engine, *_ = deepspeed.initialize(model=model.model.eval(), config=settings, dist_init_required=False)
    apply_kernels(model.eval(), device)
    return model, engine
