"""The evaluations of a run: when, and on which windows."""

from collections.abc import Callable
from dataclasses import dataclass

import deepspeed

from minimind.config.resolved_run import ResolvedTrain
from minimind.data.dataset import TokenDataset
from minimind.inference.evaluation import measure_loss
from minimind.training.record.run_files import EvaluationRecord


@dataclass(frozen=True)
class Evaluator:
    """Evaluates every `eval_every` steps and after the last one. Without a validation split (None): never."""

    dataset: TokenDataset | None
    train: ResolvedTrain
    dp_rank: int
    dp_size: int

    def is_due(self, step: int) -> bool:
        """Whether an evaluation follows step `step`."""
        every = self.train.eval_every
        return self.dataset is not None and (step == self.train.steps or bool(every and step % every == 0))

    def evaluate(self, engine: deepspeed.DeepSpeedEngine, step: int, report: Callable[[], object]) -> EvaluationRecord:
        """Mean loss over the validation windows, the same on any number of ranks. Every rank calls this.

        Args:
            report: called before each batch.
        """
        assert self.dataset is not None
        found = measure_loss(
            engine,
            self.dataset,
            engine.device,
            micro_batch_size=self.train.micro_batch_size,
            max_samples=self.train.eval_samples or None,
            dp_rank=self.dp_rank,
            dp_size=self.dp_size,
            before_batch=report,
        )
        return {
            "step": step,
            "eval_loss": found.loss,
            "eval_bits_per_byte": found.bits_per_byte,
            "eval_perplexity": found.perplexity,
            "eval_targets": found.num_targets,
        }
