"""The bodies that OpenAI's clients send, as types: what cannot be served is refused in words, never ignored."""

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from minimind.data.chat_template import Message
from minimind.inference.generation import Prompt
from minimind.inference.sampling import GenerationOptions

# Accepted: fields that do not affect the answer.
_HARMLESS = ("user", "name", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# Values that leave an unsupported field without effect.
_NEUTRAL: tuple[Any, ...] = (None, False, 0, "", {}, [])


def _read_prompts(value: Any) -> list[Prompt]:
    """One text or several, or token ids of one prompt or of several."""
    if isinstance(value, str) or (isinstance(value, list) and all(type(item) is int for item in value)):
        value = [value]
    if isinstance(value, list) and all(
        isinstance(prompt, str) or (isinstance(prompt, list) and all(type(item) is int for item in prompt))
        for prompt in value
    ):
        return value
    raise ValueError("neither a text, nor a list of texts, of token ids, or of lists of token ids")


def _read_content(value: Any) -> Any:
    """A text becomes a list of one part."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Body(BaseModel):
    """Refuses fields that are not known, unless their value has no effect."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _refuse_unknown(self) -> "Body":
        for name, value in (self.model_extra or {}).items():
            if name not in _HARMLESS and value not in _NEUTRAL:
                raise ValueError(f"{name} is not supported by this server")
        return self


class SamplingBody(Body):
    """Fields of both kinds of completion."""

    model: str = ""
    stream: bool = False
    stream_options: dict[str, bool] | None = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: Annotated[
        Annotated[list[str], Field(max_length=64)] | None,
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    ] = None
    n: Annotated[int | None, Field(ge=1)] = None
    best_of: Literal[1] | None = None

    def options(self, defaults: GenerationOptions, room: int, sample: int) -> GenerationOptions:
        """How answer number `sample` to one prompt is drawn, with room for so many tokens; `defaults` fill in what the
        client left out. Raises `UserError` for a value that is out of range.
        """
        given: dict[str, Any] = {field.name: getattr(self, field.name, None) for field in fields(GenerationOptions)}
        given["max_new_tokens"] = self.max_tokens or min(defaults.max_new_tokens, room)
        given["stop"] = None if self.stop is None else tuple(self.stop)
        given["seed"] = None if self.seed is None else self.seed + sample
        return GenerationOptions(
            **{name: getattr(defaults, name) if value is None else value for name, value in given.items()}
        )


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: Annotated[list[Any], BeforeValidator(_read_prompts)]
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None


class ContentPart(Body):
    """A part of a message; only text can be read."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """One turn of a conversation. An assistant's may be without content."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[ContentPart] | None, BeforeValidator(_read_content)] = None

    @model_validator(mode="after")
    def _ask_for_content(self) -> "ChatMessage":
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of the {self.role} needs content")
        return self


class ResponseFormat(Body):
    """The form of an answer; only free text can be given."""

    type: Literal["text"]


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    response_format: ResponseFormat | None = None
    tool_choice: Literal["none", "auto"] | None = None  # without tools, which are refused, they mean the same
    parallel_tool_calls: bool | None = None

    def turns(self) -> list[Message]:
        """The conversation in MiniMind's roles."""
        texts = ["".join(part.text for part in message.content or ()) for message in self.messages]
        roles = ["system" if message.role == "developer" else message.role for message in self.messages]
        return [Message(*turn) for turn in zip(roles, texts, strict=True)]
