"""Pretraining, and fine-tuning on conversations: predict every next token, or those of the answers."""

from typing import Any

from minimind.data.loader import Batch
from minimind.inference.evaluation import sum_loss
from minimind.training.objectives.objective import LossParts, Objective, SourceLosses


class Pretrain(Objective):
    """Causal language modelling: cross-entropy of each token given the ones before it."""

    def loss(self, engine: Any, batch: Batch) -> LossParts:
        """The cross-entropy summed over the labels of `batch`. Every rank calls this."""
        by_source = SourceLosses(batch)
        return LossParts.of(sum_loss(engine, batch, on_losses=by_source.add))._replace(sources=by_source.sums)
