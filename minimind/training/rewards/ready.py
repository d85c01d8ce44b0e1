"""Rewards that are ready to use, and examples of how to write one: a function of an `Answer` that gives a number.

Imports nothing but Python's own library: it is imported by processes that must start at once.
"""

import json
import os
import re
import urllib.request
from typing import NamedTuple


class Answer(NamedTuple):
    """What a reward is given."""

    prompt: str
    """What the model read, with the marks of the chat template."""
    text: str
    """What it wrote, without the token that closes an answer."""
    expected: str
    """The answer that stands in the data."""
    num_tokens: int
    is_finished: bool
    """Whether the model closed the answer; if not, it was cut at `max_new_tokens`."""


def exact(answer: Answer) -> float:
    """1 for the expected text, but for white space around it; else 0."""
    return float(answer.text.strip() == answer.expected.strip())


def number(answer: Answer) -> float:
    """1 where the last number in the answer is the last one in the expected text; else 0."""
    found, expected = _last_number(answer.text), _last_number(answer.expected)
    return float(found is not None and found == expected)


def thinking(answer: Answer) -> float:
    """1 for one closed `<think>` block (the prompt may have opened it) with an answer behind it; else 0."""
    whole = ("<think>" if answer.prompt.rstrip().endswith("<think>") else "") + answer.text.strip()
    return float(re.fullmatch(r"<think>((?!</?think>).)*</think>\s*((?!</?think>).)+", whole, re.S) is not None)


def length(answer: Answer) -> float:
    """1 for an answer that is closed and no longer than the expected one, in characters; less the longer it is; 0 for
    one that was cut."""
    size = max(len(answer.expected), 1)
    return size / max(len(answer.text), size) if answer.is_finished else 0.0


def judge(answer: Answer) -> float:
    """A grade from 0 to 1 by a model behind an OpenAI-compatible server: `MINIMIND_JUDGE_URL` (such as
    http://host:8000/v1), `MINIMIND_JUDGE_MODEL` and, where it wants one, `MINIMIND_JUDGE_KEY`.

    Raises:
        KeyError: the first is not set.
        OSError: the server does not answer.
        ValueError: it gives no number from 0 to 10.
    """
    text = (
        f"Question:\n{answer.prompt}\n\nReference answer:\n{answer.expected}\n\nAnswer to grade:\n{answer.text}\n\n"
        "How good is the answer to grade? Reply with one number from 0 (useless) to 10 (as good as the reference)."
    )
    body = {
        "model": os.environ.get("MINIMIND_JUDGE_MODEL", "default"),
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
    }
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("MINIMIND_JUDGE_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    url = os.environ["MINIMIND_JUDGE_URL"].rstrip("/") + "/chat/completions"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as reply:
        written = json.load(reply)["choices"][0]["message"]["content"]
    grade = _last_number(written)
    if grade is None or not 0 <= grade <= 10:
        raise ValueError(f"the judge gave no grade from 0 to 10: {written!r}")
    return grade / 10


def _last_number(text: str) -> float | None:
    found = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return float(found[-1]) if found else None
