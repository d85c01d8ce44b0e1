"""Pairs of answers: the forms that people publish, and what is no pair."""

import pytest

from minimind.data.conversations import find_feedback, find_preference
from minimind.errors import UserError

USER = {"role": "user", "content": "q"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}


@pytest.mark.parametrize(
    "record",
    [
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
    ],
)
def test_every_form_is_the_same_pair(record: dict[str, object]) -> None:
    assert find_preference(record) == {"chosen": [USER, GOOD], "rejected": [USER, BAD], "tools": None}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"chosen": [USER, GOOD]}, "needs chosen and rejected .it has 'chosen'"),
        ("text", "needs chosen and rejected .it has str"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "chosen and rejected are the same"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "rejected is no question with an answer"),
        ({"chosen": "good", "rejected": "bad"}, "assistant.* comes first"),
        ({"prompt": "q", "chosen": "", "rejected": "bad"}, "empty answer"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "other"}, BAD]}, "begin with different messages"),
        ({"prompt": 5, "chosen": 7, "rejected": "bad"}, "content is int, not a string"),
    ],
)
def test_what_is_no_pair_says_why(record: object, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        find_preference(record)


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, GOOD], "label": True},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "good"}], "label": 1},
        {"prompt": "q", "completion": "good", "label": True},
        {"prompt": [USER], "completion": [GOOD], "label": True},
    ],
)
def test_every_form_is_the_same_feedback(record: dict[str, object]) -> None:
    expected = {"chosen": [USER, GOOD], "label": True, "tools": None, "form": "feedback"}
    assert find_feedback(record) == expected
    assert find_feedback({**record, "label": False}) == {**expected, "label": False}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [USER, GOOD]}, "needs a label, true or false .it has 'messages'"),
        ({"messages": [USER, GOOD], "label": "good"}, "needs a label"),
        ({"messages": [USER], "label": True}, "ends without an answer"),
        ({"prompt": "q", "completion": [], "label": True}, "completion is no answer"),
        ({"prompt": "q", "completion": "", "label": True}, "empty answer"),
        ({"completion": "good", "label": True}, "no conversation"),
    ],
)
def test_what_is_no_feedback_says_why(record: object, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        find_feedback(record)
