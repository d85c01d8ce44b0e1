"""Multiple-choice questions: which of some continuations a model finds likeliest.

The file is JSON lines, {"context": TEXT, "choices": [TEXT, ...], "answer": NUMBER_FROM_0}; the rules are those of
EleutherAI's lm-evaluation-harness (its `multiple_choice` output type), so that the figures can be compared. Knows
nothing of commands.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from minimind.data.tokenizer import Tokenizer
from minimind.distributed.collectives import all_reduce_sum
from minimind.errors import UserError
from minimind.model import MiniMindForCausalLM


@dataclass(frozen=True)
class Question:
    """What stands before the choices, the choices, and the place of the right one."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class ChoiceScore:
    """Shares of questions answered rightly."""

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
                raise ValueError("context and at least two choices must be texts that are not empty")
            if type(question.answer) is not int or not 0 <= question.answer < len(question.choices):
                raise ValueError(f"answer {question.answer!r} is not the number of a choice, from 0")
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise UserError(f"{file} line {number}: {reason}") from None
        questions.append(question)
    if not questions:
        raise UserError(f"{file} holds no question")
    return questions


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of what follows it, encoded together; spaces between the two belong to the second."""
    blanks = len(context) - len(context.rstrip())
    if blanks:
        context, continuation = context[:-blanks], context[-blanks:] + continuation
    before = tokenizer.encode(context) or [tokenizer.eos_token_id]
    whole = tokenizer.encode(context + continuation) if context else before + tokenizer.encode(continuation)
    return whole[: len(before)], whole[len(before) :]


@torch.no_grad()
def log_likelihood(model: MiniMindForCausalLM, context: Sequence[int], continuation: Sequence[int]) -> float:
    """Log-probability, in nats, of a continuation after a context; what the model cannot read is left out in front."""
    limit = model.config.max_position_embeddings
    ids = [*context, *continuation][-(limit + 1) :]
    device = model.lm_head.weight.device
    kept = min(len(continuation), len(ids) - 1)
    logits = model(torch.tensor([ids[:-1]], device=device), logits_to_keep=kept).logits[0]
    targets = torch.tensor(ids[-kept:], device=device)
    return -float(F.cross_entropy(logits.float(), targets, reduction="sum"))


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
            totals += torch.tensor([place == question.answer for place in right], dtype=torch.float64)
    finally:
        model.train(was_training)
    if world_size > 1:
        totals = all_reduce_sum(totals)
    accuracy, accuracy_norm = (totals / len(questions)).tolist()
    return ChoiceScore(accuracy, accuracy_norm, len(questions))
