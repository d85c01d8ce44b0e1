"""Pretraining, and fine-tuning on conversations: predict every next token, or those of the answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minimind.data.dataset import Dataset
from minimind.data.loader import Batch
from minimind.inference.evaluation import sum_loss
from minimind.training.objectives.objective import LossParts


class Pretrain:
    """Causal language modelling: cross-entropy of each token given the ones before it."""

    def prepare(self, engine: Any, datasets: Mapping[str, Dataset], run_dir: Path, *, is_new: bool) -> None:
        """Nothing."""

    def count_targets(self, batches: Sequence[Batch]) -> int:
        """Tokens with a label."""
        return sum(batch.num_targets for batch in batches)

    def loss(self, engine: Any, batch: Batch) -> LossParts:
        """The cross-entropy summed over the labels of `batch`. Every rank calls this."""
        return LossParts.of(sum_loss(engine, batch))
