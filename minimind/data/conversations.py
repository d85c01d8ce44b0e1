"""Conversations of a record in the forms that people publish, brought to one: messages and tools.

Known are `messages` (OpenAI) and `conversations` (MiniMind) of role and content, `conversations` of from and value
(ShareGPT), and instruction, input and output (Alpaca). A question alone may be a `prompt`. A preference is two
conversations that begin alike, feedback one with a label.
"""

import json
from typing import Any, Literal

from minimind.errors import UserError

ConversationForm = Literal["messages", "sharegpt", "alpaca"]

_FIELDS = ("messages", "conversations", "conversation")
_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"} | {
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "function_call": "assistant",
}
_ANSWERS = ("assistant", "gpt", "function_call")
_MAY_FOLLOW = {
    "": {"system", "user"},
    "system": {"user"},
    "user": {"assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}
_THINK, _END_THINK = "<think>", "</think>"


def find_conversation(record: Any, form: ConversationForm | None = None) -> dict[str, Any]:
    """The conversation of a parsed record: `messages` (see `minimind.data.chat_template`), `tools` and its `form`.

    Args:
        form: the only one that is read; None: whichever the record has.

    Raises:
        UserError: why there is none.
    """
    found = recognise(record)
    if form not in (None, found):
        raise UserError(f"is in the form {found}, not {form}")
    raw, tools = _read_alpaca(record) if found == "alpaca" else _read_messages(record)
    conversation = _read_conversation(raw, tools)
    if (messages := conversation["messages"])[-1:] and messages[-1]["role"] == "assistant":
        return {**conversation, "form": found}
    raise UserError("it ends without an answer" if messages else "it has no messages")


def find_question(record: Any) -> dict[str, Any]:
    """The `messages` of a parsed record up to where the assistant answers, and its `tools`; an answer that ends the
    conversation is left out.

    Args:
        record: of any form of `find_conversation`, with or without that answer; or with a `prompt`, the text of a
            question or its messages, and with it a `system` message.

    Raises:
        UserError: why there is none.
    """
    if isinstance(record, dict) and isinstance(prompt := record.get("prompt"), str | list):
        raw, tools = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, record.get("tools")
        if record.get("system"):
            raw = [{"role": "system", "content": record["system"]}, *raw]
    elif isinstance(record, dict) and "instruction" in record:
        raw, tools = _read_alpaca({"output": "", **record})
    else:
        recognise(record)
        raw, tools = _read_messages(record)
    last = raw[-1] if raw else None
    if isinstance(last, dict) and last.get("role", last.get("from")) in _ANSWERS:
        raw = raw[:-1]
    question = _read_conversation(raw, tools)
    if question["messages"] and question["messages"][-1]["role"] in ("user", "tool"):
        return question
    raise UserError("it has no question")


def find_preference(record: Any) -> dict[str, Any]:
    """The pair of a parsed record: `chosen` and `rejected`, each the messages of a conversation, and `tools`.

    Args:
        record: `chosen` and `rejected` are whole conversations (MiniMind), or answers, texts or messages, to a `prompt`
            or to the question that ends `messages` or `conversations`.

    Raises:
        UserError: why there is none.
    """
    given = [record.get(name) for name in ("chosen", "rejected")] if isinstance(record, dict) else [None]
    if None in given:
        names = ", ".join(map(repr, list(record)[:8])) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"no preference: it needs chosen and rejected (it has {names})")
    sides = [side if isinstance(side, list) else [_as_answer(side)] for side in given]
    tools = record.get("tools")
    if isinstance(record.get("prompt"), str | list) or any(isinstance(record.get(field), list) for field in _FIELDS):
        question = find_question({key: value for key, value in record.items() if key not in ("chosen", "rejected")})
        # An answer may be given with the question before it.
        sides = [side if len(side) > 1 else [*question["messages"], *side] for side in sides]
        tools = question["tools"]
    chosen, rejected = (_read_conversation(side, tools) for side in sides)
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if len(side["messages"]) < 2 or side["messages"][-1]["role"] != "assistant":
            raise UserError(f"{name} is no question with an answer")
    if chosen == rejected:
        raise UserError("chosen and rejected are the same")
    if chosen["messages"][0] != rejected["messages"][0]:
        raise UserError("chosen and rejected begin with different messages")
    return {"chosen": chosen["messages"], "rejected": rejected["messages"], "tools": chosen["tools"]}


def find_feedback(record: Any) -> dict[str, Any]:
    """The judged conversation of a parsed record: its messages as `chosen`, `label` (whether its last answer was liked)
    and `tools`.

    Args:
        record: a conversation of any form of `find_conversation`, or a `prompt` with a `completion` (texts or messages,
            as trl has them); and a `label`, true or false.

    Raises:
        UserError: why there is none.
    """
    label = record.get("label") if isinstance(record, dict) else None
    if label not in (True, False):
        names = ", ".join(map(repr, list(record)[:8])) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"no feedback: it needs a label, true or false (it has {names})")
    answer = record.get("completion")
    if answer is None:
        found = find_conversation(record)
    else:
        question = find_question({key: value for key, value in record.items() if key != "completion"})
        side = answer if isinstance(answer, list) else [_as_answer(answer)]
        found = _read_conversation([*question["messages"], *side], question["tools"])
        if found["messages"][-1]["role"] != "assistant":
            raise UserError("completion is no answer")
    return {"chosen": found["messages"], "label": bool(label), "tools": found["tools"], "form": "feedback"}


def _as_answer(side: Any) -> Any:
    return side if isinstance(side, dict) else {"role": "assistant", "content": side}


def recognise(record: Any) -> ConversationForm:
    """The form of a record. Raises `UserError` with the fields it has."""
    if isinstance(record, dict):
        for field in _FIELDS:
            if isinstance(messages := record.get(field), list):
                first = messages[0] if messages else {}
                return "sharegpt" if isinstance(first, dict) and "from" in first else "messages"
        if "instruction" in record and "output" in record:
            return "alpaca"
    names = ", ".join(map(repr, list(record)[:8])) if isinstance(record, dict) else type(record).__name__
    raise UserError(f"no conversation: neither messages nor conversations nor instruction and output (it has {names})")


def _read_messages(record: dict[str, Any]) -> tuple[list[Any], Any]:
    raw = next(record[field] for field in _FIELDS if isinstance(record.get(field), list))
    tools = record.get("tools")
    if raw and isinstance(raw[0], dict) and raw[0].get("tools"):  # MiniMind keeps them in the system message
        tools = raw[0]["tools"]
    if record.get("system") and raw and isinstance(raw[0], dict) and "from" in raw[0]:  # ShareGPT has it beside them
        raw = [{"role": "system", "content": record["system"]}, *raw]
    return raw, tools


def _read_alpaca(record: dict[str, Any]) -> tuple[list[Any], Any]:
    question, more = _text(record["instruction"], "instruction"), _text(record.get("input"), "input")
    raw = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for pair in record.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError("history must be a list of pairs [question, answer]")
        raw += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    raw += [{"role": "user", "content": f"{question}\n{more}" if more else question}]
    return [*raw, {"role": "assistant", "content": record["output"]}], record.get("tools")


def _read_message(raw: Any, place: int) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise UserError(f"message {place} is {type(raw).__name__}, not an object with a role and content")
    given = raw.get("role", raw.get("from"))
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise UserError(f"message {place} has the role {given!r}: known are {', '.join(_ROLES)}")
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
        raise UserError(f"message {place} is an empty answer")
    if raw.get("train", raw.get("weight", 1)) in (False, 0):
        message["train"] = False
    return message


def _read_call(call: Any, place: int) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"message {place}: a tool call has no function name")
    return {"type": "function", "function": {key: function.get(key, {}) for key in ("name", "arguments")}}


def _read_conversation(raw: list[Any], tools: Any) -> dict[str, Any]:
    messages = [_read_message(raw_message, place) for place, raw_message in enumerate(raw, 1)]
    last = ""
    for place, message in enumerate(messages, 1):
        role = message["role"]
        if role not in _MAY_FOLLOW[last]:
            after = f"follows {'another' if role == last else last}" if last else "comes first"
            raise UserError(f"message {place} ({role}) {after}: a user's turn and an answer must alternate")
        last = role
    return {"messages": messages, "tools": _parse(tools, "tools") or None}


def _text(value: Any, name: str) -> str:
    """A string; null is empty, and of a list of parts the texts."""
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        return "\n".join(_text(part.get("text"), name) for part in value)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{name} is {type(value).__name__}, not a string")
    return value


def _parse(value: Any, name: str) -> Any:
    """A value that may be written as JSON in a string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is broken JSON: {error}") from None
