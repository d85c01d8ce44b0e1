"""Distillation: a student learns the probabilities that a teacher gives to every token (arXiv 1503.02531).

The teacher reads the same batch without a gradient. Its logits and the student's exist for one chunk of tokens at a
time, inside the student's output matrix (see `LMHead.forward`, `loss_of_chunk`). Or its most likely tokens are stored
before, and training needs no teacher.
"""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.checkpoints.formats.frozen_model import FrozenModel, keep_weights
from minimind.checkpoints.formats.load_model import find_tokenizer_file
from minimind.checkpoints.formats.source import open_source
from minimind.config.run_config import TrainConfig
from minimind.data.dataset import IGNORED_LABEL, Dataset
from minimind.data.loader import Batch, collate
from minimind.data.soft_labels import SoftLabels, SoftLabelWriter, is_complete, make_empty
from minimind.distributed.collectives import gather_objects, log, on_first_rank
from minimind.errors import UserError
from minimind.files import hash_file
from minimind.inference.evaluation import Sums, sum_loss, token_sums
from minimind.model.loss import LMHead
from minimind.parallel.mesh import ALONE, Mesh
from minimind.parallel.sequence import share_sequences
from minimind.training.objectives.objective import LossParts, Objective, SourceLosses

TEACHER_NAME = "teacher"
"""Folder in a run's: which weights the teacher has, and its most likely tokens where they are stored."""


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

    def __init__(self, train: TrainConfig, load_teacher: Callable[[], FrozenModel], mesh: Mesh = ALONE) -> None:
        self._train, self._mesh = train, mesh
        self._load_teacher = load_teacher
        self._teacher: FrozenModel | None = None  # not needed where its top k tokens are stored
        self._divergence = DIVERGENCES[train.distill_kl]

    def prepare(self, engine: Any, datasets: Mapping[str, Dataset], run_dir: Path, *, is_new: bool) -> None:
        """Load the teacher; or, where only its top k tokens count, let each of `datasets` have them: computed and
        stored in the run's folder, unless they are there. Every rank calls this.

        Raises:
            UserError: the teacher has other weights than when the run began.
        """
        train, folder = self._train, run_dir / TEACHER_NAME
        weights = keep_weights(folder / "weights.sha256", Path(str(train.teacher)), is_new=is_new)
        for split, dataset in datasets.items() if train.teacher_top_k else ():
            settings = [weights, train.distill_temperature, train.teacher_top_k, train.teacher_int8, dataset.seq_len]
            key = [*settings, type(dataset).__name__, dataset.document_mask, dataset.fingerprint]
            place = folder / f"{split}_{hashlib.sha256(repr(key).encode()).hexdigest()[:12]}"
            if not on_first_rank(functools.partial(is_complete, place)):
                self._teacher = self._teacher or self._load_teacher()
                log(f"top {train.teacher_top_k} tokens of the teacher for {len(dataset):,} windows of {split} ...")
                store_soft_labels(self._teacher, dataset, place, train, engine.device)
            dataset.soft_labels = SoftLabels(place, len(dataset), dataset.seq_len, train.teacher_top_k)
        self._teacher = None if train.teacher_top_k else self._load_teacher()
        if self._teacher is not None:
            share_sequences(self._teacher.model, self._mesh)

    def loss(self, engine: Any, batch: Batch) -> LossParts:
        """The loss summed over the labels of `batch`, and the figures of a step. Every rank calls this."""
        labels, temperature = batch.labels.flatten(), self._train.distill_temperature
        figures = {name: torch.zeros((), device=labels.device) for name in ("teacher_kl", "teacher_agreement")}
        with contextlib.ExitStack() as stack:
            if batch.soft_ids is not None and batch.soft_log_probs is not None:
                ids, soft_log_probs = batch.soft_ids.flatten(0, 1), batch.soft_log_probs.flatten(0, 1)
            else:
                assert self._teacher is not None
                states = self._teacher.hidden_states(batch.input_ids, batch.position_ids, batch.cu_seqlens).flatten(
                    0, 1
                )
                head = stack.enter_context(self._teacher.head())

            def loss_of_chunk(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
                log_q = F.log_softmax(logits.float() / temperature, dim=-1)
                if batch.soft_ids is None:
                    log_p = F.log_softmax(head(states[rows]).float() / temperature, dim=-1)
                    best = log_p.argmax(-1)
                else:
                    log_p, best = spread_rest(ids[rows], soft_log_probs[rows], log_q), ids[rows, 0]
                loss, gradient, kl = self._chunk(logits, log_q, log_p, labels[rows])
                figures["teacher_kl"] += kl
                figures["teacher_agreement"] += ((log_q.argmax(-1) == best) & (labels[rows] != IGNORED_LABEL)).sum()
                return loss, gradient

            by_source = SourceLosses(batch)
            output = sum_loss(engine, batch, loss_of_chunk=loss_of_chunk, on_losses=by_source.add)
        return LossParts.of(output)._replace(figures=figures, sources=by_source.sums)

    def evaluate(self, engine: Any, batch: Batch) -> Sums:
        """The loss of the next token alone, as any run has it, beside the figures of a step."""
        return dataclasses.replace(super().evaluate(engine, batch), loss=token_sums(engine, batch).loss)

    def _chunk(self, logits: Tensor, log_q: Tensor, log_p: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(losses (n, 1), gradient of their sum by `logits`, divergence) of (n, vocab_size) logits."""
        share, temperature = self._train.distill_alpha, self._train.distill_temperature
        counted = (labels != IGNORED_LABEL).unsqueeze(1)  # (n, 1)
        divergence = self._divergence(log_p, log_q)
        losses = (1 - share) * temperature**2 * divergence.values
        gradient = (1 - share) * temperature * divergence.gradient
        if share:
            log_probs = F.log_softmax(logits.float(), dim=-1)
            indices = labels.clamp(min=0).unsqueeze(1)
            losses = losses - share * log_probs.gather(1, indices)
            hard = log_probs.exp().scatter_add_(1, indices, log_probs.new_full((1, 1), -1.0).expand_as(indices))
            gradient = gradient + share * hard
        gradient = (gradient * counted).to(logits.dtype)
        return losses * counted, gradient, (divergence.values * counted).sum()


def spread_rest(ids: Tensor, log_probs: Tensor, log_q: Tensor) -> Tensor:
    """(n, vocab_size) log-probabilities of which only the (n, k) of `ids` are known: what they leave over is spread as
    in `log_q`, so that nothing is taught there but the sum."""
    rest = torch.log1p(-log_probs.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))
    others = log_q.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return (log_q + (rest - others)).scatter(1, ids, log_probs)


@torch.no_grad()
def store_soft_labels(
    teacher: FrozenModel, dataset: Dataset, folder: Path, train: TrainConfig, device: torch.device
) -> None:
    """Write the teacher's `teacher_top_k` most likely tokens of each window. Every rank calls this and takes an equal
    share, the last windows once more where there are too few."""
    ranks, rank, micro = (
        torch.distributed.get_world_size(),
        torch.distributed.get_rank(),
        int(train.micro_batch_size or 1),
    )
    num_here = -(-len(dataset) // ranks)
    on_first_rank(lambda: make_empty(folder))
    with SoftLabelWriter(folder, rank, ranks) as writer:
        for first in range(0, num_here, micro):
            places = [rank * num_here + place for place in range(first, min(first + micro, num_here))]
            samples = [dataset[min(place, len(dataset) - 1)] for place in places]
            batch = collate(samples, places, dataset.reference).to(device)
            states = teacher.hidden_states(batch.input_ids, batch.position_ids, batch.cu_seqlens).flatten(0, 1)
            with teacher.head() as head:
                for rows in states.split(max(1, LMHead.chunk_logits // teacher.model.config.vocab_size)):
                    log_probs = F.log_softmax(head(rows).float() / train.distill_temperature, dim=-1)
                    top = log_probs.topk(train.teacher_top_k)
                    writer.add(top.indices.cpu().numpy(), top.values.cpu().numpy())
    gather_objects(None)  # every part is there


def check_teacher(train: TrainConfig, dataset: Dataset, vocab_size: int) -> None:
    """Refuse a teacher that reads other tokens than those of the shards, or has more or fewer than the student.

    Raises:
        UserError: it does, or cannot be loaded.
    """
    path = Path(str(train.teacher))
    source = open_source(path)
    if train.teacher_top_k > vocab_size:
        raise UserError(f"teacher_top_k: {train.teacher_top_k} is more than the model's {vocab_size} tokens; lower it")
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
