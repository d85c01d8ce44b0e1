"""A conversation with a model, and the loop that runs one in a terminal."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minimind.data.chat_template import Turn, encode_chat
from minimind.data.tokenizer import Tokenizer
from minimind.errors import UserError
from minimind.inference.answer_reader import END_THINK, THINK, AnswerReader, Part, ToolCall, reader_after

HELP = """\
/help           these lines
/system TEXT    set the system message (empty: none) and start again
/thinking on    think before answers (or off), where the model's chat template can choose
/tool TEXT      give the result of a tool that the model has called
/reset          forget the conversation
/undo           take back the last question and its answer
/retry          ask the last question again
/save FILE      write the conversation as text
/exit           leave (as does Ctrl-D); Ctrl-C stops an answer"""


def open_conversation(system: str) -> list[Turn]:
    """The system message, if there is one."""
    return [{"role": "system", "content": system}] if system else []


def encode_question(
    tokenizer: Tokenizer, question: str, system: str = "", tools: Any = None, thinking: bool | None = None
) -> list[int]:
    """The token ids of a conversation's first question, up to where its answer begins."""
    turns = [*open_conversation(system), {"role": "user", "content": question}]
    return encode_chat(tokenizer, turns, tools, thinking=thinking)


@dataclass
class Chat:
    """A growing conversation. The oldest exchanges are dropped when it no longer fits `max_prompt_tokens`."""

    tokenizer: Tokenizer
    respond: Callable[[list[int]], Iterable[str]]
    """Token ids of a conversation -> pieces of the answer."""
    max_prompt_tokens: int
    system: str = ""
    tools: Any = None
    """JSON schemas of the functions that the model may call."""
    thinking: bool | None = None
    """Whether the model thinks before it answers; None: as its chat template has it."""
    turns: list[Turn] = field(default_factory=list)
    num_forgotten: int = 0

    @property
    def num_open_calls(self) -> int:
        """Calls of the last answer whose result is not there yet."""
        for results, turn in enumerate(reversed(self.turns)):
            if turn["role"] != "tool":
                return len(turn.get("tool_calls", ())) - results
        return 0

    def ask(self, question: str, role: str = "user") -> Iterator[Part]:
        """Add a question, or the result of a tool, and stream the answer; what was streamed becomes part of the
        conversation.

        Raises:
            UserError: the question alone is too long, or the model cannot answer; the question is then forgotten.
        """
        self.turns.append({"role": role, "content": question})
        reader: AnswerReader | None = AnswerReader()
        try:
            prompt = self._fit()
            reader = reader_after(self.tokenizer, prompt, self.tools)
            for piece in self.respond(prompt):
                yield from reader.push(piece)
            yield from reader.finish()
        except UserError:
            self.turns.pop()
            reader = None
            raise
        finally:  # also when interrupted: what was shown is kept
            if reader is not None:
                reader.finish()
                self.turns.append(reader.message())

    def undo(self) -> str | None:
        """Remove the last exchange; returns its question."""
        starts = [place for place, turn in enumerate(self.turns) if turn["role"] == "user"]
        if not starts:
            return None
        question = self.turns[starts[-1]]["content"]
        del self.turns[starts[-1] :]
        return str(question)

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.turns.clear()
        self.num_forgotten = 0

    def _fit(self) -> list[int]:
        while True:
            turns = open_conversation(self.system) + self.turns
            prompt = encode_chat(self.tokenizer, turns, self.tools, thinking=self.thinking)
            if len(prompt) <= self.max_prompt_tokens:
                return prompt
            later = [place for place, turn in enumerate(self.turns) if turn["role"] == "user" and place]
            if not later:
                raise UserError(
                    f"a question of {len(prompt)} tokens does not fit the {self.max_prompt_tokens} that the model can "
                    "read beside its answer: shorten it, or lower --max-new-tokens"
                )
            del self.turns[: later[0]]
            self.num_forgotten += 1


def converse(chat: Chat, read_line: Callable[[], str], write: Callable[[str], object]) -> None:
    """Chat until `/exit` or the end of the input, where `read_line` raises EOFError."""
    write("Type a message, or /help.\n")
    while True:
        try:
            line = read_line().strip()
        except UnicodeDecodeError:
            write("the line is not valid UTF-8\n")
            continue
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:
            write("\n(/exit or Ctrl-D leaves)\n")
            continue
        if line == "/exit":
            return
        try:
            role, _, result = line.partition(" ")
            if role == "/tool":
                _show_answer(chat, result.strip(), write, "tool")
            elif question := _run_command(chat, line, write) if line.startswith("/") else line:
                _show_answer(chat, question, write)
        except UserError as error:
            write(f"{error}\n")


def _run_command(chat: Chat, line: str, write: Callable[[str], object]) -> str | None:
    """Run a slash command; returns a question to ask again, if any."""
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    if command == "/help":
        write(HELP + "\n")
    elif command == "/system":
        chat.system = argument
        chat.reset()
    elif command == "/thinking":
        if argument not in ("on", "off"):
            raise UserError("/thinking needs on or off")
        chat.thinking = argument == "on"
    elif command == "/reset":
        chat.reset()
    elif command in ("/undo", "/retry"):
        question = chat.undo()
        if question is None:
            write("nothing to take back\n")
        return question if command == "/retry" else None
    elif command == "/save":
        _save(chat, argument)
        write(f"saved {argument}\n")
    else:
        write(f"unknown command {command}; /help lists them\n")
    return None


def _save(chat: Chat, path: str) -> None:
    if not path:
        raise UserError("/save needs a file name")
    turns = open_conversation(chat.system) + chat.turns
    text = "\n".join(f"{turn['role']}: {''.join(_as_text(_parts_of(turn)))}\n" for turn in turns)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def _show_answer(chat: Chat, question: str, write: Callable[[str], object], role: str = "user") -> None:
    if role == "tool" and not chat.num_open_calls:
        raise UserError("/tool: the model has called none")
    forgotten = chat.num_forgotten
    answer = chat.ask(question, role)
    try:
        for text in _as_text(answer):
            write(text)
    except KeyboardInterrupt:
        answer.close()  # type: ignore[attr-defined]
        write(" (stopped)")
    write("\n")
    if chat.num_open_calls:
        write("(/tool TEXT gives the result)\n")
    if chat.num_forgotten > forgotten:
        write(f"(the oldest {chat.num_forgotten - forgotten} exchanges no longer fit and were forgotten)\n")


def _as_text(parts: Iterable[Part]) -> Iterator[str]:
    """An answer as a terminal shows it: the thinking between its marks, each call in a line."""
    thinks, before_call = False, ""
    for part in parts:
        if part.reasoning and not thinks:
            yield f"{THINK}\n"
        elif thinks and not part.reasoning:
            yield f"\n{END_THINK}\n\n"
        thinks = bool(part.reasoning)
        yield part.reasoning or part.content
        if part.call:
            yield f"{before_call}[calls {part.call.name} {part.call.arguments}]"
        before_call = "" if thinks else "\n"
    if thinks:
        yield f"\n{END_THINK}\n"


def _parts_of(turn: Turn) -> Iterator[Part]:
    if turn.get("reasoning_content"):
        yield Part(reasoning=turn["reasoning_content"])
    yield Part(turn["content"])
    for call in turn.get("tool_calls", ()):
        yield Part(call=ToolCall(**call["function"]))
