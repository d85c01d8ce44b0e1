"""Pairs of answers: the forms that people publish, and what is no pair."""

import pytest

from minimind.data.conversations import find_preference
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
