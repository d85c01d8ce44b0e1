r"""Learning from rewards: GRPO (arXiv 2402.03300) with the corrections of DAPO and Dr. GRPO, and CISPO.

The model answers a question several times. An answer that earns more than its group's mean becomes more probable, one
that earns less becomes less so. Why that follows the expected reward, $\nabla\,\mathbb{E}[R] = \mathbb{E}[(R - b)
\nabla\ln\pi]$ for any b that does not depend on the answer, is derived in docs/en/rewards.md.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind.checkpoints.formats.frozen_model import FrozenModel
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import DTYPE_NAMES, TrainConfig
from minimind.data.loader import Batch, BatchLoader
from minimind.data.tokenizer import Tokenizer
from minimind.distributed.collectives import gather_objects, log, on_first_rank
from minimind.errors import UnmadeStep
from minimind.inference.evaluation import Sums, sum_loss
from minimind.inference.generation import complete_in_turn
from minimind.parallel.whole_model import gather_model
from minimind.training.objectives.objective import LossParts, Objective
from minimind.training.record.run_files import append_object, keep_until
from minimind.training.rewards.pool import RewardPool
from minimind.training.rewards.rollout import (
    MadeStep,
    Question,
    Rollout,
    RolloutBatch,
    collate_rollouts,
    describe_group,
    find_questions,
    load_rollouts,
    sample_answers,
    save_rollouts,
)
from minimind.training.rewards.server import RolloutServer


def group_advantages(rewards: Tensor, train: TrainConfig) -> Tensor:
    """How much more an answer earns than its group, (num_questions, group_size) -> the same shape: in standard
    deviations of the group, or as it is (Dr. GRPO, arXiv 2503.20783: else a question that is nearly always or never
    answered weighs most)."""
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    return advantages / (rewards.std(dim=1, keepdim=True) + 1e-4) if train.advantage_scale == "std" else advantages


def clipped_loss(log_probs: Tensor, sampled: Tensor, advantages: Tensor, train: TrainConfig) -> Tensor:
    r"""Of each token, any shape: $-\min(rA, \mathrm{clip}(r, 1 - \epsilon_l, 1 + \epsilon_h)A)$ with the ratio $r$ of
    its probability to that under the sampler (PPO, arXiv 1707.06347). Once the ratio has moved far enough the token
    has no gradient. DAPO (arXiv 2503.14476) lets it rise further than fall."""
    ratio = (log_probs - sampled).exp()
    clipped = ratio.clamp(1 - train.clip_low, 1 + train.clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def cispo_loss(log_probs: Tensor, sampled: Tensor, advantages: Tensor, train: TrainConfig) -> Tensor:
    r"""Of each token: $-\mathrm{sg}(\mathrm{clip}(r))\,A\ln\pi$ (CISPO, arXiv 2506.13585). The ratio is a weight
    without a gradient, so every token goes on learning."""
    ratio = (log_probs - sampled).exp().detach()
    return -ratio.clamp(1 - train.clip_low, 1 + train.clip_high) * advantages * log_probs


SAMPLES_NAME = "samples.jsonl"
"""File of a run: of each step the answers to one question, with their rewards."""
ANSWER_FIGURES = ("reward", "reward_std", "no_signal", "answer_length", "cut_share")
"""Means over the answers: reward; its deviation within a group; share of those whose group has earned alike; tokens;
share of those that were cut."""
TOKEN_FIGURES = ("ratio", "log_prob_gap", "clip_fraction", "kl")
"""Means over the tokens: ratio to the sampler's probability; how far the log-probabilities are apart; share outside the
range of clipping; estimate of the divergence from the start."""
LOSSES = {"clip": clipped_loss, "cispo": cispo_loss}


def kl_estimate(log_probs: Tensor, reference: Tensor) -> Tensor:
    """Of each token: an estimate of KL(model || reference) from what the model has drawn, never below 0 and right on
    average."""
    difference = reference - log_probs
    return difference.exp() - 1 - difference


class GroupRelative(Objective):
    """The objective of a run on questions.

    Args:
        tokenizer: that of the shards.
        loader: gives the questions of later steps.
        reference: the model that training began with, where the run keeps near it.
    """

    def __init__(
        self, resolved: ResolvedRun, tokenizer: Tokenizer, loader: BatchLoader, reference: FrozenModel | None
    ) -> None:
        self._resolved, self._train, self._tokenizer, self._reference = resolved, resolved.train, tokenizer, reference
        self._loader = loader
        self._made: dict[int, MadeStep] = {}
        self._loss = LOSSES[self._train.policy_loss]
        self._pool = RewardPool(self._train)
        self._server = RolloutServer(resolved, tokenizer) if self._train.rollout_server else None
        self._totals = (1, 1)  # answers and tokens of the step, over all ranks
        self._num_failed = 0
        self._is_cut = False  # the file of samples: what an interrupted job wrote beyond the checkpoint

    def close(self) -> None:
        """End the processes of the rewards, and what asks the server."""
        self._pool.close()
        if self._server is not None:
            self._server.close()

    def roll_out(self, engine: Any, batches: list[Batch], step: int) -> list[Batch]:
        """A group of answers to each question, with what they have earned: sampled for this step and those that share
        its rollout, or kept from when that was done.

        Raises:
            UnmadeStep: on every rank: a reward failed, or the server that answers.
        """
        later = step % self._train.rollout_steps
        if step not in self._made and later:
            found = load_rollouts(Path(self._train.run_dir), step - later)
            self._made = found if all(gather_objects(step in found)) else {}
        if step not in self._made:
            if later:
                log(f"step {step + 1}: its rollout is not here, or of other ranks: answers are sampled anew")
            end = min(step - later + self._train.rollout_steps, self._resolved.train.steps)
            ahead = [self._loader.step_batches(number) for number in range(step + 1, end)]
            self._made = self._make_steps(engine, [batches, *ahead], step)
            if self._train.rollout_steps > 1:
                save_rollouts(Path(self._train.run_dir), step - later, self._made)
        made = self._made[step]
        self._totals = made.totals
        on_first_rank(lambda: self._keep_sample(made.sample, step))
        return list(made.batches)

    def _make_steps(self, engine: Any, steps: list[list[Batch]], first: int) -> dict[int, MadeStep]:
        """What the steps from `first` on train on, by the engine's present weights."""
        size, seed = self._train.group_size, self._train.seed
        begun = [
            [
                [
                    [self._begin(question, 1.0, f"{seed} {step} {question.position} {place}") for place in range(size)]
                    for question in find_questions(batch)
                ]
                for batch in batches
            ]
            for step, batches in enumerate(steps, first)
        ]
        rows = [row for batches in begun for groups in batches for group in groups for row in group]
        rows = self._answer(engine, rows)
        failures, last = self._reward(rows), iter(rows)
        begun = [[[list(itertools.islice(last, size)) for _ in groups] for groups in batches] for batches in begun]
        made = [[self._make_batch(list(filter(is_rewarded, groups))) for groups in batches] for batches in begun]
        counts = [[(batch.num_answers, batch.num_targets) for batch in batches] for batches in made]
        everywhere = gather_objects((failures, [list(map(sum, zip(*step, strict=True))) for step in counts]))
        self._check_failures([failure for part, _ in everywhere for failure in part], first)
        found = {}
        for place, batches in enumerate(made):
            answers, tokens = map(sum, zip(*(part[place] for _, part in everywhere), strict=True))
            group = next((group for groups in begun[place] for group in groups), [])
            found[first + place] = MadeStep(batches, (max(1, answers), max(1, tokens)), describe_group(group))
        return found

    def count_targets(self, batches: Sequence[Batch]) -> int:
        """What the sum over the tokens is divided by."""
        rollouts = [batch for batch in batches if isinstance(batch, RolloutBatch)]
        return self._divisor(sum(batch.num_answers for batch in rollouts), sum(batch.num_targets for batch in rollouts))

    def loss(self, engine: Any, batch: Batch) -> LossParts:
        """The loss summed over the tokens of the answers, and the figures of a step. Every rank calls this."""
        assert isinstance(batch, RolloutBatch)
        train, reference = self._train, None
        if self._reference is not None:
            reference = sum_loss(self._reference, batch, loss_reduction="none").loss
        found: list[Tensor] = []

        def weigh(losses: Tensor) -> Tensor:
            with torch.enable_grad():
                log_probs = (-losses).requires_grad_()
                each = self._loss(log_probs, batch.sampled, batch.advantages, train)
                kl = torch.zeros_like(each) if reference is None else kl_estimate(log_probs, -reference)
                value = ((each + train.kl_coef * kl) * batch.share).sum()
                (gradient,) = torch.autograd.grad(value, log_probs)
            change = (log_probs.detach() - batch.sampled)[batch.share > 0]
            ratio = change.exp()
            is_outside = (ratio < 1 - train.clip_low) | (ratio > 1 + train.clip_high)
            sums = (ratio.sum(), change.abs().sum(), is_outside.sum().float(), kl.detach()[batch.share > 0].sum())
            found.extend([value.detach(), *sums])
            return -gradient  # the cross-entropy of a token is minus its log-probability

        output = sum_loss(engine, batch, weigh=weigh)
        assert output.loss is not None
        value, *sums = found
        # Figures are means over tokens or over answers, whatever the loss is a mean over.
        answers, tokens = self._totals
        divisor = self._divisor(answers, tokens)
        figures = dict(zip(TOKEN_FIGURES, (item * (divisor / tokens) for item in sums), strict=True))
        if reference is None:
            del figures["kl"]
        figures |= {name: value.new_tensor(item * divisor / answers) for name, item in batch.figures.items()}
        # The number of the objective with the gradient of the weighted sum.
        output = output._replace(loss=output.loss + (value - output.loss).detach())
        return LossParts.of(output)._replace(figures=figures)

    def evaluate(self, engine: Any, batch: Batch) -> Sums:
        """The rewards of the likeliest answers, their sum taken negative as a loss; an answer whose reward fails is
        left out."""
        rows = [self._begin(question, 0.0, "") for question in find_questions(batch)]
        rows = self._answer(engine, rows)
        self._reward(rows)
        rows = [row for row in rows if row.reward is not None]
        zero = torch.zeros((), device=engine.device)
        rewards, length = zero + sum(row.reward or 0.0 for row in rows), zero + sum(row.num_drawn for row in rows)
        return Sums(-rewards, len(rows), {"reward": rewards, "answer_length": length})

    @property
    def _places(self) -> int:
        """Tokens that a question and its answer may have."""
        return min(self._resolved.data.seq_len + 1, self._resolved.model.max_position_embeddings)

    def _begin(self, question: Question, temperature: float, key: str) -> Rollout:
        num_tokens = min(self._train.max_new_tokens, self._places - len(question.token_ids))
        return Rollout(question, self._tokenizer, num_tokens, temperature=temperature, key=key)

    def _answer(self, engine: Any, rows: list[Rollout]) -> list[Rollout]:
        """The last turns of what begins with `rows`, by the engine's present weights. Every rank calls this."""
        if self._server is not None:
            return self._server.answer(engine, rows, self._pool, self._places)
        model, size = gather_model(engine, self._resolved), self._train.rollout_batch_size
        dtype = getattr(torch, DTYPE_NAMES[self._train.precision])
        with torch.autocast(engine.device.type, dtype, enabled=self._resolved.zero.autocast):
            return sample_answers(
                lambda rows: list(complete_in_turn(model, self._tokenizer.vocab_size, rows, size)),
                rows,
                self._train,
                self._pool,
                self._places,
            )

    def _reward(self, rows: list[Rollout]) -> list[str]:
        """Set the rewards of answers, None where one fails. Gives the failures in words."""
        weights = self._train.reward_weights or (1.0,) * len(self._train.reward)
        answers, failures = [row.answer() for row in rows], []
        for row, answer, score in zip(rows, answers, self._pool.score(answers), strict=True):
            if error := row.failure or score.error:
                failures.append(f"{error} (answer {answer.text[:60]!r})")
            else:
                row.reward = sum(weight * value for weight, value in zip(weights, score.values, strict=True))
        return failures

    def _check_failures(self, failures: list[str], step: int) -> None:
        self._num_failed += len(failures)
        if not failures:
            return
        allowed = self._train.skip_bad_rewards
        if self._num_failed > allowed:
            raise UnmadeStep(
                f"step {step + 1}: reward {failures[0]}; correct it and run the same command again, or allow "
                "--skip-bad-rewards N"
            )
        log(f"step {step + 1}: reward {failures[0]}; left out ({self._num_failed} of {allowed} failures allowed)")

    def _make_batch(self, groups: list[list[Rollout]]) -> RolloutBatch:
        """The answers of groups, with their advantages."""
        train, rows, figures = (
            self._train,
            [row for group in groups for row in group],
            dict.fromkeys(ANSWER_FIGURES, 0.0),
        )
        if rows:
            rewards = torch.tensor([row.reward for row in rows]).view(len(groups), train.group_size)
            for row, advantage in zip(rows, group_advantages(rewards, train).flatten().tolist(), strict=True):
                row.advantage = advantage
            deviations = rewards.std(dim=1) * train.group_size
            no_signal = (deviations == 0).sum() * train.group_size
            length, cut = sum(row.num_drawn for row in rows), sum(row.reason == "length" for row in rows)
            sums = (float(rewards.sum()), float(deviations.sum()), float(no_signal), float(length), float(cut))
            figures = dict(zip(ANSWER_FIGURES, sums, strict=True))
        by_answer = train.loss_average == "answer"
        seq_len, padding_id = self._resolved.data.seq_len, self._tokenizer.eos_token_id
        return collate_rollouts(rows, seq_len, padding_id, by_answer=by_answer, figures=figures)

    def _divisor(self, answers: int, tokens: int) -> int:
        by_name = {"answer": answers, "token": tokens, "constant": answers * self._train.max_new_tokens}
        return by_name[self._train.loss_average]

    def _keep_sample(self, sample: dict[str, Any], step: int) -> None:
        """Append what a step's answers to one question were to the run's file, for people to read. Rank 0 alone."""
        path = Path(self._train.run_dir) / SAMPLES_NAME
        if not self._is_cut:
            keep_until(path, step)
            self._is_cut = True
        append_object(path, {"step": step + 1, **sample})


def is_rewarded(group: list[Rollout]) -> bool:
    """Whether every reward of a group is known: a mean over part of it would be another."""
    return all(row.reward is not None for row in group)
