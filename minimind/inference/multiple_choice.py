"""Multiple-choice questions: which of several continuations a model finds likeliest.

The file is JSON lines, {"context": TEXT, "choices": [TEXT, ...], "answer": NUMBER_FROM_0}; the rules are those of
EleutherAI's lm-evaluation-harness (its `multiple_choice` output type), so that the figures can be compared.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from minimind.data.tokenizer import Tokenizer
from minimind.distributed.collectives import all_reduce_sum
from minimind.errors import UserError
from minimind.inference.likelihood import encode_pair, log_likelihood
from minimind.model import MiniMindForCausalLM


@dataclass(frozen=True)
class Question:
    """The text before the choices, the choices, and the index of the right one."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class ChoiceScore:
    """Share of questions answered correctly."""

    accuracy: float
    """The choice of the highest probability."""
    accuracy_norm: float
    """The choice of the highest log-probability a character: length-normalised, `acc_norm` in the harness."""
    num_questions: int


def read_questions(file: Path) -> list[Question]:
    """The questions of a file. Raises `UserError` naming the first line that is wrong."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            question = Question(value["context"], tuple(value["choices"]), value["answer"])
            texts = (question.context, *question.choices)
            if not all(isinstance(text, str) and text for text in texts) or len(question.choices) < 2:
                raise ValueError("context and at least two choices must be non-empty texts")
            if type(question.answer) is not int or not 0 <= question.answer < len(question.choices):
                raise ValueError(f"answer {question.answer!r} is not the index of a choice, from 0")
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise UserError(f"{file} line {number}: {reason}") from None
        questions.append(question)
    if not questions:
        raise UserError(f"{file} holds no question")
    return questions


def score_choices(
    model: MiniMindForCausalLM,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    rank: int = 0,
    world_size: int = 1,
) -> ChoiceScore:
    """Ask every question; with several ranks, every one calls this and gets the same answer.

    A choice follows its context after one space.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64)
    try:
        for question in questions[rank::world_size]:
            scores = torch.tensor(
                [
                    log_likelihood(model, *encode_pair(tokenizer, question.context, " " + choice))
                    for choice in question.choices
                ],
                dtype=torch.float64,
            )
            lengths = torch.tensor([len(choice) for choice in question.choices])
            right = (int(scores.argmax()), int((scores / lengths).argmax()))
            totals += torch.tensor([index == question.answer for index in right], dtype=torch.float64)
    finally:
        model.train(was_training)
    if world_size > 1:
        totals = all_reduce_sum(totals)
    accuracy, accuracy_norm = (totals / len(questions)).tolist()
    return ChoiceScore(accuracy, accuracy_norm, len(questions))
