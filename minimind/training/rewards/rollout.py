"""Answers sampled from the model in training: their questions, a group of answers each, and the batch to learn from.

The tokens that were drawn are the tokens that are trained: nothing is decoded and encoded again.
"""

import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch

from minimind.checkpoints.folder import list_checkpoints, step_of
from minimind.config.run_config import TrainConfig
from minimind.data.chat_template import load_chat_template
from minimind.data.dataset import IGNORED_LABEL, Sample
from minimind.data.loader import Batch, collate
from minimind.data.packing import pack
from minimind.data.tokenizer import Tokenizer
from minimind.errors import UserError, first_line
from minimind.files import disk_errors, replace_file
from minimind.inference.decoding import Row
from minimind.inference.generation import end_tokens
from minimind.inference.sampling import GenerationOptions
from minimind.training.rewards.pool import RewardPool
from minimind.training.rewards.ready import Answer


class Question(NamedTuple):
    """A conversation up to its last answer, and that answer."""

    token_ids: list[int]
    expected: list[int]
    position: int
    """Of its window in the global order."""


def find_questions(batch: Batch) -> list[Question]:
    """The questions of a batch of conversations, each alone in its window. What fills a batch up has none."""
    questions = []
    for input_ids, labels, position in zip(batch.input_ids, batch.labels, batch.positions, strict=True):
        targets = (labels != IGNORED_LABEL).nonzero().flatten().tolist()
        if not targets:
            continue
        first = last = targets[-1]
        for place in reversed(targets):
            first = place if first - place <= 1 else first
        questions.append(Question(input_ids[: first + 1].tolist(), labels[first : last + 1].tolist(), position))
    return questions


class Rollout(Row):
    """A sampled answer, or one turn of it. Its draws depend on `key` alone.

    Args:
        num_tokens: at most so many.
        earlier: the turn before, which the question includes; its draws go on.
    """

    def __init__(
        self,
        question: Question,
        tokenizer: Tokenizer,
        num_tokens: int,
        *,
        temperature: float,
        key: str = "",
        earlier: "Rollout | None" = None,
    ) -> None:
        options = GenerationOptions(temperature=temperature, top_p=None, max_new_tokens=num_tokens)
        super().__init__(question.token_ids, options, end_tokens(tokenizer), num_logprobs=0)
        self.random = Random(key) if earlier is None else earlier.random
        self.question = question
        self.turns: list[Rollout] = [self] if earlier is None else [*earlier.turns, self]
        """Up to this one."""
        self._tokenizer = tokenizer
        self.failure = ""
        self.reward: float | None = None
        self.advantage = 0.0

    @property
    def token_ids(self) -> list[int]:
        """The question, and the tokens drawn, with the one that closes the answer."""
        return [*self.question.token_ids, *(logprob.token for logprob in self.logprobs)]

    @property
    def num_drawn(self) -> int:
        """Tokens drawn, in all turns."""
        return sum(len(turn.logprobs) for turn in self.turns)

    def answer(self) -> Answer:
        """What a reward is given: of several turns the last."""
        decode, expected, ends = self._tokenizer.decode, self.question.expected, end_tokens(self._tokenizer)
        text = decode(self.question.token_ids), decode(self.new_tokens), decode(t for t in expected if t not in ends)
        return Answer(*text, self.num_drawn, self.reason == "stop")

    def conversation(self) -> tuple[str, list[str]]:
        """The prompt and what the model has written, a text for each turn."""
        decode = self._tokenizer.decode
        return decode(self.turns[0].question.token_ids), [decode(turn.new_tokens) for turn in self.turns]

    def go_on(self, observation: str, max_new_tokens: int, places: int) -> "Rollout | None":
        """The next turn, after a tool has spoken; None where fewer than one of `places` tokens is left."""
        token_ids = [*self.token_ids, *encode_observation(self._tokenizer, observation)]
        num_tokens = min(max_new_tokens, places - len(token_ids))
        question, temperature = self.question._replace(token_ids=token_ids), self.options.temperature
        if num_tokens < 1:
            return None
        return Rollout(question, self._tokenizer, num_tokens, temperature=temperature, earlier=self)


def encode_observation(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens between an answer's closing one and the next answer, when a tool says `text` between them."""
    template = load_chat_template(tokenizer)
    before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    targets = template.encode(before).targets
    closed = len(targets) - targets[::-1].index(True)
    return template.encode_prompt([*before, {"role": "tool", "content": text}])[closed:]


def sample_answers(
    complete: Callable[[Sequence[Rollout]], object],
    rows: Sequence[Rollout],
    train: TrainConfig,
    pool: RewardPool,
    places: int,
) -> list[Rollout]:
    """Let every row grow to its end, turn after turn where there is an environment; gives the last turn of each.

    Args:
        complete: lets rows grow to the end of their turn.
        places: tokens that a whole conversation may have.
    """
    last, growing = list(rows), list(range(len(rows)))
    for turn in range(train.max_turns if train.environment is not None else 1):
        complete([last[place] for place in growing])
        growing = [place for place in growing if last[place].reason == "stop"]
        if train.environment is None or turn == train.max_turns - 1:
            break
        replies = pool.observe([last[place].conversation() for place in growing])
        spoken = dict(zip(growing, replies, strict=True))
        growing = []
        for place, reply in spoken.items():
            last[place].failure = reply.get("error") or ""
            observation = reply.get("observation")
            if observation is not None and (following := last[place].go_on(observation, train.max_new_tokens, places)):
                last[place] = following
                growing.append(place)
    return last


@dataclass(frozen=True, kw_only=True)
class RolloutBatch(Batch):
    """Sampled answers behind their questions, packed into windows; the labels are the tokens that were drawn."""

    advantages: torch.Tensor  # (B, T) float32 of the answer that a label is of
    sampled: torch.Tensor  # (B, T) float32 log-probability of a label when it was drawn
    share: torch.Tensor  # (B, T) float32: weight of a label in the sum, 0 without one
    num_answers: int
    figures: dict[str, float]  # sums over the answers


def collate_rollouts(
    rollouts: Sequence[Rollout], seq_len: int, padding_id: int, *, by_answer: bool, figures: dict[str, float]
) -> RolloutBatch:
    """As many windows of `seq_len` tokens as the answers need, at least one.

    Args:
        by_answer: a label weighs 1 / length of its answer; else 1.
    """
    lengths = np.array([len(row.token_ids) - 1 for row in rollouts], dtype=np.int64)
    order, bounds = pack(lengths, seq_len) if len(rollouts) else (np.empty(0, dtype=np.int64), np.zeros(2, dtype=int))
    samples, columns = [], np.zeros((3, len(bounds) - 1, seq_len), dtype=np.float32)
    for window in range(len(bounds) - 1):
        input_ids = np.full(seq_len, padding_id, dtype=np.int64)
        labels = np.full(seq_len, IGNORED_LABEL, dtype=np.int64)
        ends, end = [], 0
        for number in order[bounds[window] : bounds[window + 1]]:
            row, start = rollouts[number], end
            ids = row.token_ids
            end = start + len(ids) - 1
            input_ids[start:end] = ids[:-1]
            for turn in row.turns:
                first = len(turn.question.token_ids)
                here = slice(start + first - 1, start + first - 1 + len(turn.logprobs))
                labels[here] = ids[first : first + len(turn.logprobs)]
                columns[0, window, here] = row.advantage
                columns[1, window, here] = [logprob.logprob for logprob in turn.logprobs]
                columns[2, window, here] = 1 / row.num_drawn if by_answer else 1
            ends.append(end)
        starts = np.array([place for place in ends if place < seq_len], dtype=np.int64)
        samples.append(Sample(input_ids, labels, starts))
    batch = collate(samples, range(len(samples)))
    advantages, sampled, share = torch.from_numpy(columns)
    return RolloutBatch(
        **vars(batch), advantages=advantages, sampled=sampled, share=share, num_answers=len(rollouts), figures=figures
    )


class MadeStep(NamedTuple):
    """What a step trains on."""

    batches: list[RolloutBatch]
    totals: tuple[int, int]  # answers and tokens, over all ranks
    sample: dict[str, Any]  # `describe_group` of this rank's first question


def describe_group(group: Sequence[Rollout]) -> dict[str, Any]:
    """The answers to a question with their rewards, for a person."""
    answers = [row.answer() for row in group]
    if not answers:
        return {}
    shown = [{"text": one.text, "reward": row.reward} for one, row in zip(answers, group, strict=True)]
    return {"prompt": answers[0].prompt, "expected": answers[0].expected, "answers": shown}


def save_rollouts(run_dir: Path, first: int, steps: dict[int, MadeStep]) -> None:
    """Keep what this rank trains on from step `first` on, for a resume in between, and delete what no checkpoint needs
    any more."""
    path, content = _rollout_file(run_dir, first), io.BytesIO()
    torch.save({step: ([vars(batch) for batch in made.batches], *made[1:]) for step, made in steps.items()}, content)
    oldest = min((step_of(folder) for folder in list_checkpoints(run_dir)), default=0)
    with disk_errors(path):
        path.parent.mkdir(exist_ok=True)
        replace_file(path, content.getvalue())
        here = sorted(path.parent.glob(f"step_*{path.name[len('step_00000000') :]}"))
        for file, following in itertools.pairwise(here):
            if int(following.name[5:13]) <= oldest:
                file.unlink()


def load_rollouts(run_dir: Path, first: int) -> dict[int, MadeStep]:
    """What `save_rollouts` has kept on as many ranks; empty without it. Raises `UserError` when the file is damaged."""
    path = _rollout_file(run_dir, first)
    try:
        steps = torch.load(path, weights_only=True)
    except FileNotFoundError:
        return {}
    except Exception as error:  # whatever a damaged file makes torch stumble over
        raise UserError(f"{path} is damaged: {first_line(error)}; delete it to sample those answers anew") from None
    return {step: MadeStep([RolloutBatch(**one) for one in batches], *rest) for step, (batches, *rest) in steps.items()}


def _rollout_file(run_dir: Path, first: int) -> Path:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return run_dir / "rollouts" / f"step_{first:08d}_rank_{rank}_of_{size}.pt"
