"""The interface between the training loop and an objective: a batch in, the parts of its loss out."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minimind.data.dataset import IGNORED_LABEL, Dataset
from minimind.data.loader import Batch
from minimind.inference.evaluation import Sums
from minimind.model.loss import OnLosses
from minimind.model.transformer import CausalLMOutput


class LossParts(NamedTuple):
    """The loss of one micro-batch on one rank."""

    loss: torch.Tensor  # () sum over the targets of this micro-batch
    aux_loss: torch.Tensor | None = None  # () of the routers, a mean over this micro-batch; None for a dense model
    # (num_moe_layers, num_experts + 1) int64: choices of each expert, and in the last column those that were dropped
    expert_counts: torch.Tensor | None = None
    expert_share: torch.Tensor | None = None  # (num_moe_layers, num_experts) of `CausalLMOutput`
    expert_score: torch.Tensor | None = None
    figures: Mapping[str, torch.Tensor] = {}  # () each, sums over the targets: what else the log shows
    sources: torch.Tensor | None = None  # of a mixture, see `SourceLosses`

    @classmethod
    def of(cls, output: CausalLMOutput) -> "LossParts":
        """The parts of a forward whose loss is summed over the targets.

        Counts come from the forward's output, so a recomputation under activation checkpointing adds nothing.
        """
        assert output.loss is not None, "the forward had no labels"
        if output.aux_loss is None:
            return cls(output.loss)
        load, dropped = output.expert_load, output.dropped
        assert load is not None
        dropped = load.new_zeros(load.shape[0]) if dropped is None else dropped
        counts = torch.cat([load, dropped.unsqueeze(1)], dim=1)
        return cls(output.loss, output.aux_loss, counts, output.expert_share, output.expert_score)


class SourceLosses:
    """Adds up what the loss of a batch of a mixture is made of by its source, on the device: nothing waits."""

    def __init__(self, batch: Batch) -> None:
        self.sums: torch.Tensor | None = None
        """(2, num_sources) float32: the losses, and the number of targets. None: the batch is of a single corpus."""
        self.add: OnLosses | None = None
        """To be given the losses."""
        if batch.sources is None:
            return
        self.sums = torch.zeros(2, batch.num_sources, device=batch.labels.device)
        self._of_token = batch.sources.unsqueeze(1).expand_as(batch.labels).flatten()  # (B*T,)
        self.sums[1].index_add_(0, self._of_token, (batch.labels.flatten() != IGNORED_LABEL).float())
        self.add = self._add

    def _add(self, losses: torch.Tensor, rows: slice) -> None:
        assert self.sums is not None
        self.sums[0].index_add_(0, self._of_token[rows], losses.detach().flatten().float())


class Objective(ABC):
    """What a run minimises. The loop divides the summed loss by the targets of the whole step, over all ranks."""

    def prepare(  # noqa: B027 - most need nothing
        self, engine: Any, datasets: Mapping[str, Dataset], run_dir: Path, *, is_new: bool
    ) -> None:
        """What has to be known before the first step. Every rank calls this.

        Args:
            datasets: by the name of their split.
            is_new: no step has been taken yet.
        """

    def roll_out(self, engine: Any, batches: list[Batch], step: int) -> list[Batch]:
        """What a step trains on, one for each of this rank's micro-batches. Every rank calls this."""
        return batches

    def count_targets(self, batches: Sequence[Batch]) -> int:
        """Targets of a step on this rank."""
        return sum(batch.num_targets for batch in batches)

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Let go of what is beside the model."""

    @abstractmethod
    def loss(self, engine: Any, batch: Batch) -> LossParts:
        """Forward of one micro-batch, already on the device. Every rank calls this."""

    def evaluate(self, engine: Any, batch: Batch) -> Sums:
        """What an evaluation adds up of a batch of the validation split, on the device. Every rank calls this."""
        parts = self.loss(engine, batch)
        return Sums(parts.loss, self.count_targets([batch]), dict(parts.figures))
