"""The bodies that OpenAI's clients send, as types: what cannot be served is refused in words, never ignored."""

import json
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from minimind.data.chat_template import Turn
from minimind.inference.generation import Prompt
from minimind.inference.sampling import GenerationOptions

# Accepted: fields that do not affect the answer.
_HARMLESS = (
    "user",
    "name",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "cache_salt",
    "index",
)
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


def _check_arguments(text: str) -> str:
    """Arguments as the model wrote them; none may be an empty text."""
    try:
        if isinstance(json.loads(text or "{}"), dict):
            return text or "{}"
    except (ValueError, RecursionError):
        pass
    raise ValueError("not a JSON object, as text")


def _check_tools(tools: list[Any]) -> list[Any]:
    """Functions, which stay as they are: the template writes them as it did in training."""
    for place, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"number {place} is not a function with a name")
        if function.get("strict"):
            raise ValueError(
                f"strict is not supported: arguments of {function['name']} cannot be forced into its schema"
            )
    return tools


def _check_tool_choice(choice: Any) -> Any:
    if choice not in (None, "none", "auto"):
        raise ValueError("a call cannot be forced: give 'none' or 'auto'")
    return choice


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
    return_token_ids: bool = False
    logit_bias: dict[int, float] | None = None


class WeightsFolder(Body):
    """Where new weights lie, seen from the server."""

    weights_path: Path


class WeightsBody(Body):
    """POST /collective_rpc, of vLLM's methods this one."""

    method: Literal["reload_weights"]
    kwargs: WeightsFolder


class ContentPart(Body):
    """A part of a message; only text can be read."""

    type: Literal["text"]
    text: str


class Function(Body):
    """What an assistant's call names."""

    name: str
    arguments: Annotated[str, AfterValidator(_check_arguments)]


class Call(Body):
    """A call in an assistant's message."""

    id: str = ""
    type: Literal["function"] = "function"
    function: Function


class ChatMessage(Body):
    """One turn of a conversation. An assistant's may be without content."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[ContentPart] | None, BeforeValidator(_read_content)] = None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check_role(self) -> "ChatMessage":
        if self.role != "assistant":
            if self.content is None:
                raise ValueError(f"a message of the {self.role} needs content")
            if self.reasoning_content or self.tool_calls:
                raise ValueError(f"reasoning_content and tool_calls are the assistant's, not the {self.role}'s")
        if self.tool_call_id and self.role != "tool":
            raise ValueError(f"tool_call_id is a tool's, not the {self.role}'s")
        return self

    def turn(self) -> Turn:
        """The message as chat templates take it."""
        text = "".join(part.text for part in self.content or ())
        found: Turn = {"role": "system" if self.role == "developer" else self.role, "content": text}
        calls = [call.model_dump() for call in self.tool_calls or ()]
        more = {"reasoning_content": self.reasoning_content, "tool_calls": calls, "tool_call_id": self.tool_call_id}
        return found | {name: value for name, value in more.items() if value}


class ResponseFormat(Body):
    """The form of an answer; only free text can be given."""

    type: Literal["text"]


class TemplateOptions(Body):
    """Variables of the chat template."""

    enable_thinking: bool | None = None


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any] | None, AfterValidator(_check_tools)] = None
    tool_choice: Annotated[Literal["none", "auto"] | None, BeforeValidator(_check_tool_choice)] = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None

    @model_validator(mode="after")
    def _check_calls(self) -> "ChatBody":
        if self.tools and self.parallel_tool_calls is False:
            raise ValueError("parallel_tool_calls: the model cannot be kept to one call")
        called: list[str] | None = None
        for place, message in enumerate(self.messages):
            if message.role != "tool":
                called = [call.id for call in message.tool_calls or ()] or None
            elif called is None:
                raise ValueError(f"messages.{place}: a tool's message must follow the call that it answers")
            elif message.tool_call_id and message.tool_call_id not in called:
                raise ValueError(f"messages.{place}: no call before it has the id {message.tool_call_id!r}")
        return self

    @property
    def offered(self) -> list[Any] | None:
        """The tools that may be called."""
        return None if self.tool_choice == "none" else self.tools

    @property
    def thinking(self) -> bool | None:
        """Whether the model is to think first; None: as its template has it."""
        return self.chat_template_kwargs.enable_thinking if self.chat_template_kwargs else None

    def turns(self) -> list[Turn]:
        """The conversation; results of tools in the order of their calls, by which alone most templates tell them
        apart."""
        turns: list[Turn] = []
        for role, group in groupby(self.messages, lambda message: message.role):
            messages = list(group)
            if role == "tool":
                ids = [call["id"] for call in turns[-1]["tool_calls"]]
                messages.sort(key=lambda message: ids.index(message.tool_call_id) if message.tool_call_id else 0)
            turns += [message.turn() for message in messages]
        return turns
