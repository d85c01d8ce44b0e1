"""Pairs of answers: the forms that people publish, and what is no pair."""

import json
from pathlib import Path

import pytest
from prepared_corpus import find_unfinished, interrupt_at, read_folder
from tokenizers_for_tests import save_byte_level

from data_prep.tokenize_corpus import prepare
from data_prep.tokenize_preferences import TokenizePreferencesFlags
from data_prep.writing.encode_chat import PreferenceOptions
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


@pytest.mark.parametrize("unpaired", [False, True])
def test_interrupted_it_ends_with_the_same_bytes(
    tmp_path: Path, small_chunks: None, monkeypatch: pytest.MonkeyPatch, unpaired: bool
) -> None:
    """Which answer to another question stands beside a judged one depends on the inputs alone."""
    words = [f"{number:03d}" for number in range(300)]
    pairs = [{"prompt": f"say {word}", "chosen": word, "rejected": f"no {word}"} for word in words]
    judged = [{"prompt": f"say {word}", "completion": word, "label": word < "150"} for word in words]
    source, tokenizer = tmp_path / "records.jsonl", save_byte_level(tmp_path / "tokenizer")
    source.write_text("".join(json.dumps(record) + "\n" for record in (judged if unpaired else pairs)))

    def run(output: Path) -> None:
        flags = {"input": (str(source),), "tokenizer": tokenizer, "shard_tokens": 3000, "val_fraction": 0.1}
        flags |= {"unpaired": unpaired, "workers": 1, "output": output}
        prepare(TokenizePreferencesFlags(**flags), PreferenceOptions)  # type: ignore[arg-type]

    run(tmp_path / "whole")
    for chunk in (2, 4):
        with monkeypatch.context() as patch:
            interrupt_at(patch, chunk)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / "out")
        assert find_unfinished(tmp_path / "out")
    run(tmp_path / "out")
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "whole")
