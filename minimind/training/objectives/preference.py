"""Learning from pairs of a preferred and a rejected answer, DPO, IPO, ORPO, SimPO, and from single judged ones, KTO.

Each loss is a function of the two answers' log-probabilities. Its derivative by them, taken on these few numbers,
weighs the cross-entropy of every token: the gradient of the model is then that of the objective (see
`MiniMindForCausalLM.forward`, `weigh`), at the price of one more pass through the output matrix.
"""

import dataclasses
import functools
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.accelerator import has_streams
from minimind.checkpoints.formats.frozen_model import FrozenModel, keep_weights
from minimind.config.run_config import PreferenceObjective, TrainConfig
from minimind.data.dataset import Dataset
from minimind.data.loader import Batch, eval_batches
from minimind.distributed.collectives import all_reduce_sum, log, on_first_rank
from minimind.errors import UserError
from minimind.files import disk_errors, replace_file
from minimind.inference.evaluation import Sums, answer_log_probs, sum_answers, sum_loss
from minimind.parallel.mesh import ALONE, Mesh
from minimind.parallel.sequence import whole_rows
from minimind.training.objectives.objective import LossParts, Objective

REFERENCE_NAME = "reference"
"""Folder in a run's: log-probabilities of the answers under the model that training began with."""


FIGURES = ("reward_accuracy", "reward_margin", "chosen_log_prob", "rejected_log_prob", "kl")
"""Means over the pairs: share in which the chosen answer has the larger reward; by how much; log-probability
a token of both; how much less probable, a token, the answers are than under the reference, which estimates the
divergence on these texts. Of feedback: against the baseline of `kto_loss`, which is the last, in nats."""


class Answers(NamedTuple):
    """Of each of n pairs, (n,) float32: log-probability of the whole answers under model and reference, and length."""

    chosen: Tensor
    rejected: Tensor
    chosen_reference: Tensor
    rejected_reference: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    # Of feedback, whose one answer is the first, and the second that of another question:
    liked: Tensor | None = None  # (n,) bool
    baseline: Tensor | float = 0.0  # () reward of the whole step's second answers, divided by beta


def dpo_loss(answers: Answers, train: TrainConfig) -> Tensor:
    r"""Direct preference optimisation (arXiv 2305.18290), (n,): $-\ln\sigma(\beta\Delta)$, where $\Delta$ is how much
    more the model than the reference prefers the chosen answer; with label smoothing $\epsilon$ a share of the pairs
    counts the other way round."""
    logits = train.beta * _margin(answers, train)
    smoothing = train.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)


def ipo_loss(answers: Answers, train: TrainConfig) -> Tensor:
    r"""Identity preference optimisation (arXiv 2310.12036), (n,): $(\Delta - 1/2\beta)^2$ on log-probabilities a token,
    which stops pulling once the margin is reached."""
    return (_margin(per_token(answers), train) - 1 / (2 * train.beta)).square()


def orpo_loss(answers: Answers, train: TrainConfig) -> Tensor:
    r"""Odds-ratio preference optimisation (arXiv 2403.07691), (n,): the cross-entropy of the chosen answer, a mean over
    its tokens, and $-\beta\ln\sigma$ of the logarithm of the ratio of odds. No reference."""
    answers = per_token(answers)
    odds = (answers.chosen - _log1mexp(answers.chosen)) - (answers.rejected - _log1mexp(answers.rejected))
    return -answers.chosen - train.beta * F.logsigmoid(odds)


def simpo_loss(answers: Answers, train: TrainConfig) -> Tensor:
    r"""Simple preference optimisation (arXiv 2405.14734), (n,): $-\ln\sigma(\beta(m - \gamma))$, m the difference of
    the log-probabilities a token and $\gamma$ a margin (`target_margin`; the paper's gamma divided by beta). No
    reference."""
    answers = per_token(answers)
    return -F.logsigmoid(train.beta * (answers.chosen - answers.rejected - train.target_margin))


def kto_loss(answers: Answers, train: TrainConfig) -> Tensor:
    r"""Kahneman-Tversky optimisation (arXiv 2402.01306), (n,): $\lambda(1 - \sigma(\pm\beta(r - z)))$ of single
    answers, plus where it was liked, minus where not, each with its $\lambda$. r is how much more probable the model
    finds the answer than the reference does; z the same, and at least 0, in the mean over answers to other questions,
    which estimates how far the model has moved and has no gradient."""
    assert answers.liked is not None
    weight = torch.where(answers.liked, train.desirable_weight, train.undesirable_weight)
    return weight * torch.sigmoid(-train.beta * _surplus(answers))


def _surplus(answers: Answers) -> Tensor:
    """By how much the answers' log-probability has moved, against the baseline, to where they should go: (n,)."""
    moved = answers.chosen - answers.chosen_reference - answers.baseline
    return torch.where(answers.liked, moved, -moved) if answers.liked is not None else moved


LOSSES: dict[PreferenceObjective, Callable[[Answers, TrainConfig], Tensor]] = {
    "dpo": dpo_loss,
    "ipo": ipo_loss,
    "orpo": orpo_loss,
    "simpo": simpo_loss,
    "kto": kto_loss,
}
WITH_REFERENCE = ("dpo", "ipo", "kto")


def per_token(answers: Answers) -> Answers:
    """The log-probabilities as means over the tokens of an answer."""
    chosen, rejected = answers.chosen_length.clamp(min=1), answers.rejected_length.clamp(min=1)
    return answers._replace(
        chosen=answers.chosen / chosen,
        rejected=answers.rejected / rejected,
        chosen_reference=answers.chosen_reference / chosen,
        rejected_reference=answers.rejected_reference / rejected,
    )


def _margin(answers: Answers, train: TrainConfig) -> Tensor:
    if train.length_normalised:
        answers = per_token(answers)
    return (answers.chosen - answers.chosen_reference) - (answers.rejected - answers.rejected_reference)


def _log1mexp(log_prob: Tensor) -> Tensor:
    """ln(1 - exp(x)) for x < 0, exact at both ends."""
    log_prob = log_prob.clamp(max=-1e-6)  # a probability of 1 has no odds
    return torch.where(log_prob > -0.693, torch.log(-torch.expm1(log_prob)), torch.log1p(-log_prob.exp()))


class Preference(Objective):
    """The objective of a run on pairs, or on feedback; the loss is a mean over the pairs, or answers, of a step."""

    def __init__(
        self, train: TrainConfig, name: PreferenceObjective, reference: FrozenModel | None = None, mesh: Mesh = ALONE
    ) -> None:
        self._train, self._mesh = train, mesh
        self._name = name
        self._loss = LOSSES[name]
        self._needs_reference = name in WITH_REFERENCE
        self._reference = reference  # None: its log-probabilities are stored
        self._baseline: Tensor | float = 0.0  # of feedback, and so the next
        self._shares: Sequence[Tensor | float] = (1.0, 1.0)  # of liked and other answers in the step

    def prepare(self, engine: Any, datasets: Mapping[str, Dataset], run_dir: Path, *, is_new: bool) -> None:
        """Let each of `datasets`, by the name of its split, know the log-probabilities of its answers under the model
        that training begins with: computed when the run is new, and kept in its folder. Every rank calls this.

        Raises:
            UserError: the run is not new, and they are not there or are not of these pairs.
        """
        if self._reference is not None:
            keep_weights(run_dir / REFERENCE_NAME / "weights.sha256", Path(str(self._train.init_from)), is_new=is_new)
        is_stored = self._needs_reference and self._reference is None
        for split, dataset in datasets.items() if is_stored else ():
            # Named by the pairs too: on other shards a continued run must not take these for theirs.
            path = run_dir / REFERENCE_NAME / f"{split}_{dataset.fingerprint[:12]}.npy"
            if is_new:
                log(f"log-probabilities of {len(dataset):,} windows of {split} pairs before training ...")
                dataset.reference = measure_answers(engine, dataset, int(self._train.micro_batch_size or 1))
                on_first_rank(functools.partial(_save, path, dataset.reference))
            else:
                num_documents = dataset.reader.manifest.total_documents
                dataset.reference = on_first_rank(functools.partial(_load, path, num_documents))

    def count_targets(self, batches: Sequence[Batch]) -> int:
        """Pairs, which of the ranks that share their rows the first one counts."""
        return sum(len(batch.pairs) for batch in batches) if self._mesh.sp_rank == 0 else 0

    @torch.no_grad()
    def roll_out(self, engine: Any, batches: list[Batch], step: int) -> list[Batch]:
        """The batches, which KTO reads first: its baseline is a mean over the whole step. Every rank calls this."""
        if self._name == "kto":
            total = torch.zeros(3, device=engine.device)  # the second answers' movement, number of answers, liked ones
            engine.eval()
            for batch in (one.to(engine.device, non_blocking=has_streams(engine.device)) for one in batches):
                reference, liked = self._read_reference(batch), batch.liked
                assert reference is not None and liked is not None
                moved = (answer_log_probs(engine, batch, self._mesh.sequence)[0] - reference)[1::2]
                total += torch.stack([moved.sum(), torch.ones_like(moved).sum(), liked.float().sum()])
            engine.train()
            moved, count, num_liked = all_reduce_sum(total)
            self._baseline = (moved / count.clamp(min=1)).clamp(min=0)
            self._shares = [part.clamp(min=1) / count.clamp(min=1) for part in (num_liked, count - num_liked)]
        return batches

    def loss(self, engine: Any, batch: Batch) -> LossParts:
        """The loss summed over the pairs of `batch`, and the figures of a step. Every rank calls this."""
        found: list[Tensor] = []
        reference = self._read_reference(batch)

        def weigh(losses: Tensor) -> Tensor:
            sums, lengths = sum_answers(losses, batch, self._mesh.sequence)
            with torch.enable_grad():
                sums.requires_grad_()
                answers = pair_up(sums, lengths, reference)
                if self._name == "kto":
                    answers = answers._replace(liked=batch.liked, baseline=self._baseline)
                value = self._loss(answers, self._train).sum()
                (gradient,) = torch.autograd.grad(value, sums) if len(sums) else (sums,)
            is_first = float(self._mesh.sp_rank == 0)
            found.extend(is_first * figure for figure in (value.detach(), *self._figures(answers)))
            assert batch.answers is not None
            # d loss / d log-probability of a token is that of its answer, and the cross-entropy is minus the latter.
            return -F.pad(gradient.detach(), (1, 0))[batch.answers + 1]

        output = sum_loss(engine, batch, weigh=weigh)
        assert output.loss is not None
        value, *figures = found
        # The number of the objective with the gradient of the weighted sum.
        output = output._replace(loss=output.loss + (value - output.loss).detach())
        return LossParts.of(output)._replace(figures=dict(zip(FIGURES, figures, strict=True)))

    def evaluate(self, engine: Any, batch: Batch) -> Sums:
        """As in a step; of feedback without the figures that compare answers of the whole step."""
        sums = super().evaluate(engine, batch)
        kept = FIGURES if self._name != "kto" else FIGURES[:2]
        return dataclasses.replace(sums, figures={name: sums.figures[name] for name in kept})

    def _read_reference(self, batch: Batch) -> Tensor | None:
        return (
            batch.reference
            if self._reference is None
            else answer_log_probs(self._reference, batch, self._mesh.sequence)[0]
        )

    @torch.no_grad()
    def _figures(self, answers: Answers) -> list[Tensor]:
        mean, beta = per_token(answers), self._train.beta
        chosen, rejected = mean.chosen.sum(), mean.rejected.sum()
        if answers.liked is not None:
            margin = _surplus(answers)
            kl = answers.baseline * torch.ones_like(margin).sum()
            sides = (answers.liked, ~answers.liked)
            chosen, rejected = (
                (mean.chosen * side).sum() / share for side, share in zip(sides, self._shares, strict=True)
            )
        elif self._needs_reference:
            margin = _margin(answers, self._train)
            kl = (mean.chosen_reference - mean.chosen + mean.rejected_reference - mean.rejected).sum() / 2
        else:
            margin, kl = mean.chosen - mean.rejected, answers.chosen.new_zeros(())
        return [(margin > 0).sum().float(), beta * margin.sum(), chosen, rejected, kl]


def pair_up(sums: Tensor, lengths: Tensor, reference: Tensor | None) -> Answers:
    """The answers of (2 * num_pairs,) values, preferred and rejected in turn. Without a reference it is taken as 0."""
    reference = torch.zeros_like(sums) if reference is None else reference
    return Answers(sums[::2], sums[1::2], reference[::2], reference[1::2], lengths[::2], lengths[1::2])


@torch.no_grad()
def measure_answers(engine: Any, dataset: Dataset, micro_batch_size: int) -> np.ndarray:
    """(num_documents, 2) float32 log-probabilities of the answers under the engine's weights; NaN for a pair that fits
    no window. Every rank calls this, and each reads its share."""
    group = engine.seq_data_parallel_group  # the ranks of a tensor group read the same
    ranks, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    table = torch.zeros(dataset.reader.manifest.total_documents, 3, dtype=torch.float64)
    engine.eval()
    with whole_rows(engine.module):
        for batch in eval_batches(dataset, micro_batch_size, rank, ranks):
            log_probs, _ = answer_log_probs(engine, batch.to(engine.device))
            table[list(batch.pairs), :2] = log_probs.view(-1, 2).cpu().double()
            table[list(batch.pairs), 2] = 1
    engine.train()
    table = all_reduce_sum(table, group)
    table[table[:, 2] == 0] = float("nan")
    return table[:, :2].float().numpy()


def _save(path: Path, values: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, values)
    with disk_errors(path):
        path.parent.mkdir(exist_ok=True)
        replace_file(path, content.getvalue())


def _load(path: Path, num_documents: int) -> np.ndarray:
    try:
        values = np.load(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: {error}: without the log-probabilities before training this run cannot go on; bring the file "
            "back, or begin anew with --resume never"
        ) from None
    if values.shape != (num_documents, 2):
        raise UserError(f"{path} is of {len(values)} pairs and the shards have {num_documents}; give the run's own")
    return np.asarray(values, dtype=np.float32)
