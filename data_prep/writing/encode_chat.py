"""Conversations, and pairs of them, as documents: the text is their JSON in one form, the tokens those of a chat
template."""

import functools
import json
from array import array
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import tyro

from data_prep.reading.byte_stream import Source
from data_prep.reading.records import FormedText, Rejected, TxtDocuments
from data_prep.writing.encode_chunk import CorpusOptions, Encoded
from minimind.data.chat_template import ChatTemplate, UntrainableTemplate, load_chat_template
from minimind.data.conversations import ConversationForm, find_conversation, find_feedback, find_preference
from minimind.data.manifest import DISLIKED_TARGET, REJECTED_START, REJECTED_TARGET, DocumentKind
from minimind.data.tokenizer import Tokenizer
from minimind.errors import UserError
from minimind.schema import AT_LEAST_1

_PROBE = [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]
_load_chat_template = functools.lru_cache(maxsize=1)(load_chat_template)


@dataclass(frozen=True, kw_only=True)
class ChatOptions(CorpusOptions):
    """With the inputs, what decides the contents of prepared conversations."""

    form: ConversationForm | None = None
    """Form of the records: messages (OpenAI, MiniMind), sharegpt or alpaca (recognised record by record)."""
    train_on: Literal["all", "last"] = "all"
    """Answers that are trained: all of a conversation, or its last alone."""
    seq_len: Annotated[int | None, AT_LEAST_1] = None
    """Tokens of a window in training: a message that does not fit is bad, and the share of padding is said."""

    # Of no meaning here.
    text_field: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    txt_documents: Annotated[TxtDocuments, tyro.conf.Suppress] = "paragraph"
    special_text: Annotated[Literal["special", "plain"], tyro.conf.Suppress] = "plain"
    reads_whole_records: ClassVar[bool] = True

    def find_text(self, record: Any) -> str | Rejected:
        """The conversation in a record as JSON of one form, so that equal conversations are equal texts."""
        try:
            found = self.read_record(record)
        except UserError as error:
            return Rejected(str(error))
        form = found.pop("form", "preference")
        return FormedText.of(json.dumps(found, ensure_ascii=False), form)  # tools keep the order of their keys

    def encode(self, tokenizer: Tokenizer, texts: list[str]) -> list[Encoded | Rejected]:
        """The tokens and targets of each conversation, or why the template refuses it."""
        template = _load_chat_template(tokenizer)
        documents: list[Encoded | Rejected] = []
        for record in self.read_texts(texts):
            try:
                token_ids, targets = self.encode_record(template, **record)
            except UserError as error:
                documents.append(Rejected(str(error)))
                continue
            num_bytes = len(tokenizer.decode(token_ids).encode())
            documents.append(Encoded(array(tokenizer.typecode, token_ids).tobytes(), bytes(targets), num_bytes))
        return documents

    def template_text(self, tokenizer: Tokenizer) -> str:
        """The chat template that conversations are written with. Raises `UserError` if it can train no conversation."""
        template = _load_chat_template(tokenizer)
        try:
            template.encode(_PROBE)
        except UntrainableTemplate as error:
            raise UserError(f"{tokenizer.file.parent}: {error}") from None
        except UserError:
            pass  # it may want other conversations than this one
        return template.text

    def check_sources(self, sources: list[Source]) -> None:
        """Raise `UserError` for a text file, which holds no conversations."""
        for source in sources:
            if source.format in ("txt", "warc"):
                raise UserError(f"{source.name} is plain text: conversations are read from records, such as .jsonl")

    def read_record(self, record: Any) -> dict[str, Any]:
        """What of a record becomes tokens. Raises `UserError`: why there is none."""
        return find_conversation(record, self.form)

    def read_texts(self, texts: list[str]) -> list[dict[str, Any]]:
        """What each text of a chunk says."""
        return list(map(json.loads, texts))

    def encode_record(
        self, template: ChatTemplate, messages: list[dict[str, Any]], tools: Any
    ) -> tuple[list[int], list[int]]:
        """Token ids, and the value of each in the targets file.

        Raises:
            UserError: the template refuses the conversation, or nothing of it is to be trained.
        """
        token_ids, targets = template.encode(messages, tools, last_only=self.train_on == "last")
        if not any(targets):
            raise UserError("none of its answers is to be trained")
        if self.seq_len is not None and len(token_ids) > self.seq_len:
            lengths = [len(template.tokenizer.encode(_written(message))) for message in messages]
            for place, length in enumerate(lengths, 1):
                if length > self.seq_len:
                    raise UserError(f"message {place} has {length:,} tokens, above --seq-len {self.seq_len:,}")
        return token_ids, list(map(int, targets))


def _written(message: dict[str, Any]) -> str:
    """The text of a message, tool calls included."""
    calls = json.dumps(message["tool_calls"], ensure_ascii=False) if "tool_calls" in message else ""
    return message.get("reasoning_content", "") + message["content"] + calls


@dataclass(frozen=True, kw_only=True)
class PreferenceOptions(ChatOptions):
    """With the inputs, what decides the contents of prepared preferences."""

    unpaired: bool = False
    """The records are single answers with a label, true (liked) or false, and not pairs."""

    # Of no meaning here.
    form: Annotated[ConversationForm | None, tyro.conf.Suppress] = None
    train_on: Annotated[Literal["all", "last"], tyro.conf.Suppress] = "all"

    def read_record(self, record: Any) -> dict[str, Any]:
        """The two conversations, or the judged one. Raises `UserError`: why there are none."""
        return find_feedback(record) if self.unpaired else find_preference(record)

    def read_texts(self, texts: list[str]) -> list[dict[str, Any]]:
        """The pairs of a chunk; of feedback each question with its own answer, and with that of the next record."""
        records = super().read_texts(texts)
        others = [record["chosen"][-1] for record in records] if self.unpaired else []
        for record, other in zip(records, [*others[1:], *others[:1]], strict=False):
            record["rejected"] = [*record["chosen"][:-1], other]
        return records

    def encode_record(  # type: ignore[override]
        self,
        template: ChatTemplate,
        chosen: list[dict[str, Any]],
        rejected: list[dict[str, Any]],
        tools: Any,
        label: bool = True,
    ) -> tuple[list[int], list[int]]:
        """Both conversations, one after the other; only answers in which they differ are targets, of feedback the
        last."""
        differ = (i for i, (a, b) in enumerate(zip([*chosen, None], [*rejected, None])) if a != b)  # noqa: B905
        shared = len(chosen) - 1 if self.unpaired else next(differ)
        sides = [
            [{**message, "train": place >= shared} for place, message in enumerate(side)] for side in (chosen, rejected)
        ]
        (chosen_ids, chosen_targets), (rejected_ids, rejected_targets) = (
            super(PreferenceOptions, self).encode_record(template, side, tools) for side in sides
        )
        values = [REJECTED_TARGET * target for target in rejected_targets]
        if rejected_targets[0]:
            raise UserError("the chat template writes nothing before an answer")
        first = chosen_targets if label else [DISLIKED_TARGET * target for target in chosen_targets]
        return chosen_ids + rejected_ids, [*first, REJECTED_START, *values[1:]]

    @property
    def kind(self) -> DocumentKind:
        """Pairs, or single answers with a label."""
        return "feedback" if self.unpaired else "preferences"
