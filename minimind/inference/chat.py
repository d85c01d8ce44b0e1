"""A conversation in MiniMind's chat format, and the loop that runs one in a terminal.

A turn is `<|im_start|>role`, a line break, the content, `<|im_end|>` and a line break. Typed text never becomes one of
these marks.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from minimind.data.chat_template import Message, encode_chat
from minimind.data.tokenizer import Tokenizer
from minimind.errors import UserError

HELP = """\
/help           these lines
/system TEXT    set the system message (empty: none) and start again
/reset          forget the conversation
/undo           take back the last question and its answer
/retry          ask the last question again
/save FILE      write the conversation as text
/exit           leave (as does Ctrl-D); Ctrl-C stops an answer"""


def encode_question(tokenizer: Tokenizer, question: str, system: str = "") -> list[int]:
    """The token ids of a conversation's first question, up to where its answer begins."""
    opening = [Message("system", system)] if system else []
    return encode_chat(tokenizer, [*opening, Message("user", question)])


@dataclass
class Chat:
    """A growing conversation. The oldest exchanges are dropped when it no longer fits `max_prompt_tokens`."""

    tokenizer: Tokenizer
    respond: Callable[[list[int]], Iterable[str]]
    """Token ids of a conversation -> pieces of the answer."""
    max_prompt_tokens: int
    system: str = ""
    turns: list[Message] = field(default_factory=list)
    num_forgotten: int = 0

    def ask(self, question: str) -> Iterator[str]:
        """Add a question and stream its answer; what was streamed becomes part of the conversation.

        Raises:
            UserError: the question alone is too long, or the model cannot answer; the question is then forgotten.
        """
        self.turns.append(Message("user", question))
        answer = ""
        try:
            for piece in self.respond(self._fit()):
                answer += piece
                yield piece
        except UserError:
            self.turns.pop()
            raise
        finally:  # also when interrupted: what was shown is kept
            if self.turns and self.turns[-1].role == "user":
                self.turns.append(Message("assistant", answer))

    def undo(self) -> str | None:
        """Remove the last exchange; returns its question."""
        if len(self.turns) < 2:
            return None
        question = self.turns[-2].content
        del self.turns[-2:]
        return question

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.turns.clear()
        self.num_forgotten = 0

    def _fit(self) -> list[int]:
        opening = [Message("system", self.system)] if self.system else []
        while len(prompt := encode_chat(self.tokenizer, opening + self.turns)) > self.max_prompt_tokens:
            if len(self.turns) == 1:
                raise UserError(
                    f"a question of {len(prompt)} tokens does not fit the {self.max_prompt_tokens} that the model can "
                    "read beside its answer: shorten it, or lower --max-new-tokens"
                )
            del self.turns[:2]
            self.num_forgotten += 1
        return prompt


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
            question = _run_command(chat, line, write) if line.startswith("/") else line
            if question:
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
    messages = ([Message("system", chat.system)] if chat.system else []) + chat.turns
    try:
        Path(path).write_text("\n".join(f"{m.role}: {m.content}\n" for m in messages), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def _show_answer(chat: Chat, question: str, write: Callable[[str], object]) -> None:
    forgotten = chat.num_forgotten
    answer = chat.ask(question)
    try:
        for piece in answer:
            write(piece)
    except KeyboardInterrupt:
        answer.close()  # type: ignore[attr-defined]
        write(" (stopped)")
    write("\n")
    if chat.num_forgotten > forgotten:
        write(f"(the oldest {chat.num_forgotten - forgotten} exchanges no longer fit and were forgotten)\n")
