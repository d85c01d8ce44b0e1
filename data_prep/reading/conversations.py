"""Conversations of a record in the forms that people publish, brought to one: messages and tools.

Known are `messages` (OpenAI) and `conversations` (MiniMind) of role and content, `conversations` of from and value
(ShareGPT), and instruction, input and output (Alpaca).
"""

import json
from typing import Any, Literal

from data_prep.reading.records import Rejected

ConversationForm = Literal["messages", "sharegpt", "alpaca"]

_FIELDS = ("messages", "conversations", "conversation")
_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"} | {
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "function_call": "assistant",
}
_MAY_FOLLOW = {
    "": {"system", "user"},
    "system": {"user"},
    "user": {"assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}
_THINK, _END_THINK = "<think>", "</think>"


def find_conversation(record: Any, form: ConversationForm | None = None) -> dict[str, Any] | Rejected:
    """The conversation of a parsed record: `messages` (see `minimind.data.chat_template`), `tools` and its `form`.

    Args:
        form: the only one that is read; None: whichever the record has.
    """
    try:
        found = recognise(record)
        if form not in (None, found):
            raise Rejected(f"is in the form {found}, not {form}")
        raw, tools = _read_alpaca(record) if found == "alpaca" else _read_messages(record)
        messages = [_read_message(raw_message, place) for place, raw_message in enumerate(raw, 1)]
        if found == "sharegpt" and record.get("system"):
            messages.insert(0, {"role": "system", "content": _text(record["system"], "system")})
        _check_turns(messages)
        return {"messages": messages, "tools": _parse(tools, "tools") or None, "form": found}
    except Rejected as rejected:
        return rejected.with_traceback(None)


def recognise(record: Any) -> ConversationForm:
    """The form of a record. Raises `Rejected` with the fields it has."""
    if isinstance(record, dict):
        for field in _FIELDS:
            if isinstance(messages := record.get(field), list):
                first = messages[0] if messages else {}
                return "sharegpt" if isinstance(first, dict) and "from" in first else "messages"
        if "instruction" in record and "output" in record:
            return "alpaca"
    names = ", ".join(map(repr, list(record)[:8])) if isinstance(record, dict) else type(record).__name__
    raise Rejected(f"no conversation: neither messages nor conversations nor instruction and output (it has {names})")


def _read_messages(record: dict[str, Any]) -> tuple[list[Any], Any]:
    raw = next(record[field] for field in _FIELDS if isinstance(record.get(field), list))
    tools = record.get("tools")
    if raw and isinstance(raw[0], dict) and raw[0].get("tools"):  # MiniMind keeps them in the system message
        tools = raw[0]["tools"]
    return raw, tools


def _read_alpaca(record: dict[str, Any]) -> tuple[list[Any], Any]:
    question, more = _text(record["instruction"], "instruction"), _text(record.get("input"), "input")
    raw = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for pair in record.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise Rejected("history must be a list of pairs [question, answer]")
        raw += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    raw += [{"role": "user", "content": f"{question}\n{more}" if more else question}]
    return [*raw, {"role": "assistant", "content": record["output"]}], record.get("tools")


def _read_message(raw: Any, place: int) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise Rejected(f"message {place} is {type(raw).__name__}, not an object with a role and content")
    given = raw.get("role", raw.get("from"))
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise Rejected(f"message {place} has the role {given!r}: known are {', '.join(_ROLES)}")
    content = _text(raw.get("content", raw.get("value")), f"message {place}: content")
    calls = raw.get("tool_calls")
    if given == "function_call":
        content, calls = "", content
    message: dict[str, Any] = {"role": role, "content": content}
    if role != "assistant":
        return message
    reasoning = _text(raw.get("reasoning_content"), f"message {place}: reasoning_content")
    if not reasoning and content.startswith(_THINK) and _END_THINK in content:
        reasoning, _, content = content.removeprefix(_THINK).partition(_END_THINK)
        reasoning, message["content"] = reasoning.strip("\n"), content.lstrip("\n")
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls := _parse(calls, f"message {place}: tool_calls"):
        message["tool_calls"] = [_read_call(call, place) for call in (calls if isinstance(calls, list) else [calls])]
    if not (message["content"].strip() or message.get("tool_calls")):
        raise Rejected(f"message {place} is an empty answer")
    if raw.get("train", raw.get("weight", 1)) in (False, 0):
        message["train"] = False
    return message


def _read_call(call: Any, place: int) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Rejected(f"message {place}: a tool call has no function name")
    return {"type": "function", "function": {key: function.get(key, {}) for key in ("name", "arguments")}}


def _check_turns(messages: list[dict[str, Any]]) -> None:
    last = ""
    for place, message in enumerate(messages, 1):
        role = message["role"]
        if role not in _MAY_FOLLOW[last]:
            after = f"follows {'another' if role == last else last}" if last else "comes first"
            raise Rejected(f"message {place} ({role}) {after}: a user's turn and an answer must alternate")
        last = role
    if last != "assistant":
        raise Rejected("it ends without an answer" if messages else "it has no messages")


def _text(value: Any, name: str) -> str:
    """A string; null is empty, and of a list of parts the texts."""
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        return "\n".join(_text(part.get("text"), name) for part in value)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Rejected(f"{name} is {type(value).__name__}, not a string")
    return value


def _parse(value: Any, name: str) -> Any:
    """A value that may be written as JSON in a string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise Rejected(f"{name} is broken JSON: {error}") from None
