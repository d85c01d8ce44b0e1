"""What an answer consists of, found in its text as it grows: thinking, content and tool calls.

The marks are those that MiniMind, Qwen3 and others write: `<think>` at the beginning, and `<tool_call>` around JSON.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from minimind.data.tokenizer import Tokenizer
from minimind.inference.text_stream import overlap

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"


class ToolCall(NamedTuple):
    """A function that the model wants to be called."""

    name: str
    arguments: str
    """A JSON object, as the model wrote it."""


class Part(NamedTuple):
    """More of an answer; one of the three is set."""

    content: str = ""
    reasoning: str = ""
    call: ToolCall | None = None


class AnswerReader:
    """Reads an answer from pieces of its text; where they are cut makes no difference.

    Of well-formed text, what a template writes around the parts is left out, so that it writes the same text when the
    answer becomes part of a history. A tool call that is none stays content.

    Args:
        before: the end of the text before the answer: a template may have opened the thinking.
        reads_calls: whether tools were offered; otherwise `<tool_call>` is content.
    """

    def __init__(self, before: str = "", *, reads_calls: bool = False) -> None:
        self.content = ""
        self.reasoning = ""
        self.calls: list[ToolCall] = []
        self._reads_calls = reads_calls
        self._held = ""  # not yet understood
        self._gap = ""  # what stood before the current call
        self._searched = 0  # in `_held`: no call ends before
        self._parts: list[Part] = []
        self._state = self._read_start
        if before.rstrip().endswith(THINK):
            self._state = self._read_thinking if before.endswith("\n") else self._read_opening

    def push(self, piece: str) -> list[Part]:
        """Add text; returns what is now certain."""
        return self._read(piece, is_last=False)

    def finish(self) -> list[Part]:
        """End the text; returns what was held back."""
        return self._read("", is_last=True)

    def message(self) -> dict[str, Any]:
        """The answer as a message of a conversation."""
        found: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            found["reasoning_content"] = self.reasoning
        if self.calls:
            found["tool_calls"] = [{"type": "function", "function": call._asdict()} for call in self.calls]
        return found

    def name_end(self, reason: str | None) -> str | None:
        """Why the answer has ended, in OpenAI's words, where the text has for `reason`."""
        return "tool_calls" if reason == "stop" and self.calls else reason

    def _read(self, piece: str, is_last: bool) -> list[Part]:
        self._held += piece
        self._parts = []
        state, held = None, None
        while (state, held) != (self._state, self._held):
            state, held = self._state, self._held
            state(is_last)
        return self._parts

    def _give(self, content: str = "", reasoning: str = "", call: ToolCall | None = None) -> None:
        self.content += content
        self.reasoning += reasoning
        self.calls += [call] if call else []
        if content or reasoning or call:
            self._parts.append(Part(content, reasoning, call))

    def _give_held(self, length: int) -> str:
        """Take so many characters out of `_held`."""
        taken, self._held = self._held[:length], self._held[length:]
        return taken

    def _read_start(self, is_last: bool) -> None:
        if self._held.startswith(THINK):
            self._give_held(len(THINK))
            self._state = self._read_opening
        elif is_last or not THINK.startswith(self._held):
            self._state = self._read_content

    def _read_opening(self, is_last: bool) -> None:
        if self._held or is_last:
            self._held = self._held.removeprefix("\n")
            self._state = self._read_thinking

    def _read_thinking(self, is_last: bool) -> None:
        end = self._held.find(END_THINK)
        if end >= 0:
            self._give(reasoning=self._give_held(end).removesuffix("\n"))
            self._give_held(len(END_THINK))
            self._state = self._read_closing
        else:
            self._give(reasoning=self._give_held(self._certain(END_THINK, is_last)))

    def _read_closing(self, is_last: bool) -> None:
        """The blank line after the thinking."""
        if is_last or not "\n\n".startswith(self._held) or self._held == "\n\n":
            self._held = self._held.removeprefix("\n").removeprefix("\n")
            self._state = self._read_content

    def _read_content(self, is_last: bool) -> None:
        start = self._held.find(CALL) if self._reads_calls else -1
        if start >= 0:
            content = self._give_held(start)
            self._gap = "\n" if content.endswith("\n") else ""
            self._give(content.removesuffix("\n"))
            self._open_call()
        else:
            self._give(self._give_held(self._certain(CALL, is_last or not self._reads_calls)))

    def _open_call(self) -> None:
        self._give_held(len(CALL))
        self._searched = 0
        self._state = self._read_call

    def _read_call(self, is_last: bool) -> None:
        end = self._held.find(END_CALL, self._searched)
        if end < 0:
            self._searched = max(self._searched, len(self._held) - len(END_CALL) + 1)
            if is_last:
                self._give(self._gap + CALL + self._give_held(len(self._held)))
                self._state = self._read_content
            return
        body, after = self._held[:end], end + len(END_CALL)
        try:
            call = parse_call(body)
        except json.JSONDecodeError as error:
            if error.msg.startswith("Unterminated string"):  # the mark stands inside a string
                self._searched = after
                return self._read_call(is_last)
            call = None
        if call is None:
            self._give(self._gap + CALL + self._give_held(after))
        else:
            self._give(call=call)
            self._give_held(after)
        self._state = self._read_content if call is None else self._read_between

    def _read_between(self, is_last: bool) -> None:
        """After a call: white space alone, another call, or content."""
        text = self._held.lstrip()
        if text.startswith(CALL):
            self._gap = self._give_held(len(self._held) - len(text))
            self._open_call()
        elif is_last and not text:
            self._held = ""
        elif is_last or not CALL.startswith(text):
            self._state = self._read_content

    def _certain(self, mark: str, is_last: bool) -> int:
        """How many characters of `_held` are no beginning of `mark`, or of a line break before it."""
        return len(self._held) - (0 if is_last else max(overlap(self._held, mark), overlap(self._held, "\n" + mark)))


def reader_after(tokenizer: Tokenizer, prompt: Sequence[int], tools: Any) -> AnswerReader:
    """The reader of the answer to a prompt that offers `tools`, if any."""
    longest_opening = 16  # tokens: `assistant`, `<think>` and line breaks, in whatever pieces
    return AnswerReader(tokenizer.decode(prompt[-longest_opening:]), reads_calls=bool(tools))


def read_message(tokenizer: Tokenizer, prompt: Sequence[int], tools: Any, text: str) -> dict[str, Any]:
    """The message in the whole text of the answer to a prompt."""
    reader = reader_after(tokenizer, prompt, tools)
    reader.push(text)
    reader.finish()
    return reader.message()


def parse_call(body: str) -> ToolCall | None:
    """The call in the JSON between the marks: `{"name": "...", "arguments": {...}}`; None if it is another.

    Raises:
        json.JSONDecodeError: it is no JSON.
    """
    try:
        found = json.loads(body, parse_constant=_refuse)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError):  # NaN, a number of thousands of digits, thousands of brackets
        return None
    name, arguments = (found.get(key) for key in ("name", "arguments")) if isinstance(found, dict) else (None, None)
    if not isinstance(name, str) or not name or not name.isprintable() or not isinstance(arguments, dict):
        return None
    return ToolCall(name, _written(body, arguments) or json.dumps(arguments))


def _written(body: str, arguments: dict[str, Any]) -> str | None:
    """The text of the arguments, where they stand last."""
    _, key, rest = body.partition('"arguments"')
    text = rest.strip().removeprefix(":").strip().removesuffix("}").strip()
    try:
        return text if key and json.loads(text) == arguments else None
    except ValueError:
        return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
