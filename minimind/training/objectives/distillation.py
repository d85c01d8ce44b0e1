"""Distillation: a student learns the probabilities that a teacher gives to every token (arXiv 1503.02531).

The teacher reads the same batch without a gradient. Its logits and the student's exist for one chunk of tokens at a
time, inside the student's output matrix (see `LMHead.forward`, `loss_of_chunk`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.checkpoints.formats.frozen_model import FrozenModel
from minimind.checkpoints.formats.load_model import find_tokenizer_file
from minimind.checkpoints.formats.source import open_source
from minimind.config.run_config import TrainConfig
from minimind.data.dataset import IGNORED_LABEL, Dataset
from minimind.data.loader import Batch
from minimind.errors import UserError
from minimind.files import hash_file
from minimind.inference.evaluation import sum_loss
from minimind.training.objectives.objective import LossParts, Objective


class Divergence(NamedTuple):
    """Of each of n tokens under teacher p and student q, both softened by the temperature."""

    values: Tensor  # (n, 1) in nats
    gradient: Tensor  # (n, vocab_size) by the student's softened logits


def forward_kl(log_p: Tensor, log_q: Tensor) -> Divergence:
    """KL(p || q): the student covers all that the teacher finds likely."""
    p = log_p.exp()
    return Divergence((p * (log_p - log_q)).sum(dim=-1, keepdim=True), log_q.exp() - p)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Divergence:
    """KL(q || p): the student keeps to what the teacher finds likely (arXiv 2306.08543)."""
    q, difference = log_q.exp(), log_q - log_p
    values = (q * difference).sum(dim=-1, keepdim=True)
    return Divergence(values, q * (difference - values))


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Divergence]] = {"forward": forward_kl, "reverse": reverse_kl}


class Distillation(Objective):
    r"""The objective $\alpha\,\mathrm{CE} + (1 - \alpha)\,\tau^2\,\mathrm{KL}$ a token, where both models' logits are
    divided by the temperature $\tau$ in the divergence."""

    def __init__(self, train: TrainConfig, teacher: FrozenModel) -> None:
        self._train = train
        self._teacher = teacher
        self._divergence = DIVERGENCES[train.distill_kl]

    def loss(self, engine: Any, batch: Batch) -> LossParts:
        """The loss summed over the labels of `batch`, and the figures of a step. Every rank calls this."""
        inputs = (batch.input_ids, batch.position_ids, batch.cu_seqlens)
        states = self._teacher.hidden_states(*inputs).flatten(0, 1)
        labels = batch.labels.flatten()
        figures = {"teacher_kl": states.new_zeros((), dtype=torch.float32)}
        figures["teacher_agreement"] = torch.zeros_like(figures["teacher_kl"])

        def loss_of_chunk(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            loss, gradient, kl, agreement = self._chunk(logits, head(states[rows]), labels[rows])
            figures["teacher_kl"] += kl
            figures["teacher_agreement"] += agreement
            return loss, gradient

        with self._teacher.head() as head:
            output = sum_loss(engine, batch, loss_of_chunk=loss_of_chunk)
        return LossParts.of(output)._replace(figures=figures)

    def _chunk(self, logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(loss, gradient by `logits`, divergence, tokens with the same best choice) of (n, vocab_size) logits."""
        share, temperature = self._train.distill_alpha, self._train.distill_temperature
        counted = (labels != IGNORED_LABEL).unsqueeze(1)  # (n, 1)
        agreement = ((logits.argmax(-1) == teacher_logits.argmax(-1)).unsqueeze(1) & counted).sum()
        wide = logits.float()
        log_q = F.log_softmax(wide / temperature, dim=-1)
        log_p = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
        divergence = self._divergence(log_p, log_q)
        losses = (1 - share) * temperature**2 * divergence.values
        gradient = (1 - share) * temperature * divergence.gradient
        if share:
            log_probs = F.log_softmax(wide, dim=-1)
            indices = labels.clamp(min=0).unsqueeze(1)
            losses = losses - share * log_probs.gather(1, indices)
            hard = log_probs.exp().scatter_add_(1, indices, log_probs.new_full((1, 1), -1.0).expand_as(indices))
            gradient = gradient + share * hard
        gradient = (gradient * counted).to(logits.dtype)
        return (losses * counted).sum(), gradient, (divergence.values * counted).sum(), agreement.float()


def check_teacher(path: Path, dataset: Dataset, vocab_size: int) -> None:
    """Refuse a teacher that reads other tokens than those of the shards, or has more or fewer than the student.

    Raises:
        UserError: it does, or cannot be loaded.
    """
    source = open_source(path)
    if (there := source.config.vocab_size) != vocab_size:
        raise UserError(
            f"teacher: {path} has {there} tokens and this run's model {vocab_size}; pass --vocab-size {there}"
        )
    tokenizer_file = find_tokenizer_file(source.tokenizer_file or source.folder)
    if hash_file(tokenizer_file) != dataset.reader.manifest.tokenizer.sha256:
        raise UserError(
            f"teacher: {path} has another tokenizer ({tokenizer_file}) than the shards ({dataset.reader.folder}): its "
            "tokens mean something else; prepare the shards with the teacher's tokenizer"
        )
