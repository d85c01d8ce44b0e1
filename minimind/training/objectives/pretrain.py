"""Pretraining: predict every next token of the corpus."""

from collections.abc import Sequence
from typing import Any

from minimind.data.loader import Batch
from minimind.inference.evaluation import sum_loss
from minimind.training.objectives.objective import LossParts


class Pretrain:
    """Causal language modelling: cross-entropy of each token given the ones before it."""

    def count_targets(self, batches: Sequence[Batch]) -> int:
        """Tokens with a label."""
        return sum(batch.num_targets for batch in batches)

    def loss(self, engine: Any, batch: Batch) -> LossParts:
        """The cross-entropy summed over the labels of `batch`. Every rank calls this."""
        return LossParts.of(sum_loss(engine, batch))
