"""Conversations in the forms that people publish."""

import json
import re
from typing import Any

import pytest

from minimind.data.conversations import find_conversation as read
from minimind.data.conversations import find_question
from minimind.errors import UserError

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    ("record", "form"),
    [
        ({"messages": [USER, ANSWER]}, "messages"),
        ({"conversations": [USER, ANSWER]}, "messages"),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}, "sharegpt"),
        ({"instruction": "hi", "input": "", "output": "hello"}, "alpaca"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, ANSWER]}, "messages"),
    ],
)
def test_every_form_is_one_conversation(record: dict[str, Any], form: str) -> None:
    assert read(record) == {"messages": [USER, ANSWER], "tools": None, "form": form}
    assert read(record, form)["messages"] == [USER, ANSWER]


def test_optional_fields_of_minimind() -> None:
    system = {"role": "system", "content": "be brief", "tools": json.dumps(TOOLS)}
    called = {"role": "assistant", "content": "", "reasoning_content": "why", "tool_calls": json.dumps([CALL])}
    tool = {"role": "tool", "content": "1"}
    found = read({"conversations": [system, USER, called, tool, ANSWER]})
    assert found["tools"] == TOOLS
    assert found["messages"][0] == {"role": "system", "content": "be brief"}
    assert found["messages"][2] == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "why",
        "tool_calls": [CALL],
    }


def test_thinking_written_into_an_answer_is_reasoning() -> None:
    found = read({"messages": [USER, {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nhello"}]})
    assert found["messages"][1] == {**ANSWER, "reasoning_content": "why"}
    assert (
        read({"messages": [USER, {"role": "assistant", "content": "<think>\n\n</think>\n\nhello"}]})["messages"][1]
        == ANSWER
    )


def test_sharegpt_with_system_tools_and_calls() -> None:
    turns = [
        ("human", "hi"),
        ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
        ("observation", "1"),
        ("gpt", "hello"),
    ]
    record = {"system": "be brief", "tools": json.dumps(TOOLS)}
    found = read({**record, "conversations": [{"from": role, "value": value} for role, value in turns]})
    assert [message["role"] for message in found["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    assert found["messages"][2]["tool_calls"] == [CALL] and found["tools"] == TOOLS


def test_alpaca_with_input_system_and_history() -> None:
    record = {"instruction": "add", "input": "1 2", "output": "3", "system": "be brief", "history": [["hi", "hello"]]}
    assert [message["content"] for message in read(record)["messages"]] == [
        "be brief",
        "hi",
        "hello",
        "add\n1 2",
        "3",
    ]


@pytest.mark.parametrize("mark", [{"train": False}, {"weight": 0}])
def test_answers_that_are_not_trained(mark: dict[str, Any]) -> None:
    assert read({"messages": [USER, {**ANSWER, **mark}]})["messages"][1]["train"] is False


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"text": "hi"}, "no conversation: neither .* (it has 'text')"),
        ([1], "it has list"),
        ({"messages": []}, "it has no messages"),
        ({"messages": [USER]}, "it ends without an answer"),
        ({"messages": [ANSWER]}, "message 1 (assistant) comes first"),
        ({"messages": [USER, USER, ANSWER]}, "message 2 (user) follows another"),
        ({"messages": [USER, ANSWER, USER]}, "it ends without an answer"),
        ({"messages": [{"role": "narrator", "content": "hi"}]}, "message 1 has the role 'narrator'"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "message 2 is an empty answer"),
        ({"messages": [{"role": "user", "content": 5}, ANSWER]}, "message 1: content is int, not a string"),
        ({"messages": [USER, {**ANSWER, "tool_calls": "[{"}]}, "message 2: tool_calls is broken JSON"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [5]}]}, "message 2: a tool call has no function name"),
        ({"messages": [USER, ANSWER], "tools": "{"}, "tools is broken JSON"),
        ({"messages": ["hi"]}, "message 1 is str"),
        ({"instruction": "a", "output": "b", "history": "x"}, "history must be a list of pairs"),
    ],
)
def test_what_is_no_conversation_says_why(record: Any, problem: str) -> None:
    with pytest.raises(UserError, match=" .* ".join(map(re.escape, problem.split(" .* ")))):
        read(record)


def test_another_form_than_the_one_named_is_rejected() -> None:
    with pytest.raises(UserError, match="is in the form messages, not alpaca"):
        read({"messages": [USER, ANSWER]}, "alpaca")


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "hi"},
        {"prompt": [USER]},
        {"messages": [USER]},
        {"messages": [USER, ANSWER]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": ""}]},
        {"instruction": "hi"},
        {"instruction": "hi", "output": "hello"},
    ],
)
def test_a_question_is_what_stands_before_the_answer(record: dict[str, Any]) -> None:
    assert find_question(record) == {"messages": [USER], "tools": None}


def test_a_question_has_what_stands_before_it() -> None:
    system, called = (
        {"role": "system", "content": "be brief"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
    )
    turns = [system, USER, called, {"role": "tool", "content": "1"}]
    assert find_question({"messages": turns, "tools": json.dumps(TOOLS)}) == {"messages": turns, "tools": TOOLS}
    assert find_question({"prompt": "hi", "system": "be brief"})["messages"] == [system, USER]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"text": "hi"}, "no conversation"),
        ({"prompt": 5}, "no conversation"),
        ({"messages": []}, "it has no question"),
        ({"messages": [ANSWER]}, "it has no question"),
        ({"messages": [USER, ANSWER, ANSWER]}, "it has no question"),
        ({"messages": [{"role": [], "content": "x"}]}, "message 1 has the role []"),
        ({"messages": [{"role": "system", "content": "be brief"}]}, "it has no question"),
        ({"messages": [USER, USER]}, "message 2 (user) follows another"),
    ],
)
def test_what_is_no_question_says_why(record: Any, problem: str) -> None:
    with pytest.raises(UserError, match=re.escape(problem)):
        find_question(record)
