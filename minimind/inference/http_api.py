"""OpenAI's HTTP interface to a `Batcher`: models, completions, chat completions with server-sent events, a chat page.

A client's mistake is a 4xx with the reason; an unsupported field is refused, never ignored.
"""

import asyncio
import contextlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from minimind.data.chat_template import Message, encode_chat
from minimind.data.tokenizer import Tokenizer
from minimind.errors import UserError
from minimind.inference.batching import Batcher, QueueFull, Request, Update
from minimind.inference.generation import GenerationOptions

PAGE = Path(__file__).with_name("chat_page.html")
MAX_BODY_BYTES = 1 << 20
_DISCONNECT_CHECK_SECONDS = 0.05
# Accepted: fields that do not affect the answer.
_HARMLESS = frozenset(("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"))
# Values that leave an unsupported field without effect.
_NEUTRAL: tuple[Any, ...] = (None, False, 0, {}, [])

StopTexts = Annotated[list[str], Field(max_length=16)]


class SamplingBody(BaseModel):
    """Fields of both kinds of completion."""

    model_config = ConfigDict(extra="allow")

    model: str = ""
    stream: bool = False
    stream_options: dict[str, bool] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | StopTexts | None = None
    n: int | None = 1


class CompletionBody(SamplingBody):
    """POST /v1/completions: one prompt, as text or token ids."""

    prompt: str | list[int] | Annotated[list[str], Field(max_length=1)]


class ContentPart(BaseModel):
    """A part of a message; only text is supported."""

    type: str
    text: str = ""


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    role: str
    content: str | list[ContentPart]


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = None


class RequestError(Exception):
    """A client's mistake: an HTTP status and the reason."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def build_app(
    batcher: Batcher, tokenizer: Tokenizer, *, model_name: str, defaults: GenerationOptions, api_key: str | None
) -> FastAPI:
    """The application. `defaults` fill in what a request leaves out, with `max_new_tokens` cut to what fits."""
    app = FastAPI(title="MiniMind", docs_url=None, redoc_url=None, openapi_url=None)
    answers = Answers(batcher, tokenizer, model_name, defaults)
    app.add_middleware(RequestGuard, api_key=api_key)
    app.exception_handler(RequestError)(lambda _, error: error_response(error.status, str(error)))
    app.exception_handler(UserError)(lambda _, error: error_response(400, str(error)))
    app.exception_handler(RequestValidationError)(lambda _, error: error_response(400, describe(error)))
    app.exception_handler(StarletteHTTPException)(lambda _, error: error_response(error.status_code, str(error.detail)))

    @app.get("/", response_class=HTMLResponse)
    async def show_page() -> str:
        return PAGE.read_text(encoding="utf-8")

    @app.get("/health")
    async def check_health() -> dict[str, Any]:
        return {"status": "ok", "waiting": batcher.num_waiting}

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [answers.describe_model()]}

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> dict[str, Any]:
        if name != model_name:
            raise HTTPException(404, f"there is no model {name!r}, only {model_name!r}")
        return answers.describe_model()

    @app.post("/v1/completions")
    async def complete(body: CompletionBody, http: HTTPRequest) -> Response:
        prompt: Any = body.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
            (prompt,) = prompt
        ids = tokenizer.encode(prompt) or [tokenizer.eos_token_id] if isinstance(prompt, str) else prompt
        return await answers.answer(body, ids, body.max_tokens, http, chat=False)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, http: HTTPRequest) -> Response:
        ids = encode_chat(tokenizer, [read_message(message) for message in body.messages])
        limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        return await answers.answer(body, ids, limit, http, chat=True)

    return app


class RequestGuard:
    """Checks of every request to /v1: the API key and the size of the body.

    Plain ASGI: under Starlette's `BaseHTTPMiddleware`, `is_disconnected` never becomes true.
    """

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refuse(HTTPRequest(scope)) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)

    def _refuse(self, http: HTTPRequest) -> Response | None:
        if not http.url.path.startswith("/v1/"):
            return None
        given = http.headers.get("authorization", "").removeprefix("Bearer ")
        if self._api_key is not None and not hmac.compare_digest(given.encode(), self._api_key.encode()):
            return error_response(401, "the API key is missing or wrong: send it as Authorization: Bearer KEY")
        length = http.headers.get("content-length", "0")
        if http.method == "POST" and ("content-length" not in http.headers or not length.isdecimal()):
            return error_response(411, "the request needs a Content-Length")
        if int(length) > MAX_BODY_BYTES:
            return error_response(413, f"a body of {length} bytes is beyond the {MAX_BODY_BYTES} that are read")
        return None


def error_response(status: int, message: str) -> JSONResponse:
    """An error in OpenAI's form."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    headers = {"Retry-After": "1"} if status == 429 else None
    error = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": error}, status_code=status, headers=headers)


def describe(error: RequestValidationError) -> str:
    """The first mistake in a body, in one line."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    return f"{place}: {first['msg']}" if place else str(first["msg"])


def read_message(message: ChatMessage) -> Message:
    """A turn of MiniMind's chat format."""
    role = "system" if message.role == "developer" else message.role
    if role not in ("system", "user", "assistant"):
        raise RequestError(400, f"role {message.role!r} is not one of system, user, assistant")
    if isinstance(message.content, str):
        return Message(role, message.content)
    for part in message.content:
        if part.type != "text":
            raise RequestError(400, f"content of type {part.type!r} cannot be read, only text")
    return Message(role, "".join(part.text for part in message.content))


class Answers:
    """Passes checked bodies to the batcher and turns its updates into responses."""

    def __init__(self, batcher: Batcher, tokenizer: Tokenizer, model_name: str, defaults: GenerationOptions) -> None:
        self._batcher = batcher
        self._tokenizer = tokenizer
        self._model_name = model_name
        self._defaults = defaults
        self._started = int(time.time())

    def describe_model(self) -> dict[str, Any]:
        """An entry of the list of models."""
        return {"id": self._model_name, "object": "model", "created": self._started, "owned_by": "minimind"}

    async def answer(
        self, body: SamplingBody, prompt: list[int], limit: int | None, http: HTTPRequest, *, chat: bool
    ) -> Response:
        """Queue a prompt and answer with its continuation, in one piece or as events."""
        if body.model and body.model != self._model_name:
            raise RequestError(404, f"there is no model {body.model!r}, only {self._model_name!r}")
        options = self._read_options(body, len(prompt), limit)
        updates: asyncio.Queue[Update] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        request = Request(prompt, options, lambda update: loop.call_soon_threadsafe(updates.put_nowait, update))
        try:
            self._batcher.submit(request)
        except QueueFull:
            raise RequestError(429, f"{self._batcher.num_waiting} requests wait already: try again later") from None
        frame = Frame(self._model_name, len(prompt), chat)
        if body.stream:
            usage = bool((body.stream_options or {}).get("include_usage"))
            return StreamingResponse(self._stream(request, updates, frame, usage), media_type="text/event-stream")
        text, last = "", Update()
        try:
            async for last in self._until_end(updates, http):
                text += last.text
        finally:
            self._batcher.cancel(request)
        if last.reason == "error":
            return error_response(500, last.error)
        return JSONResponse(frame.whole(text, last))

    @staticmethod
    async def _until_end(updates: "asyncio.Queue[Update]", http: HTTPRequest) -> AsyncIterator[Update]:
        """Every update, until the client disconnects."""
        looked, update = time.monotonic(), Update()
        while update.reason is None:
            with contextlib.suppress(asyncio.TimeoutError):
                update = await asyncio.wait_for(updates.get(), _DISCONNECT_CHECK_SECONDS)
                yield update
            if time.monotonic() - looked >= _DISCONNECT_CHECK_SECONDS:
                looked = time.monotonic()
                if await http.is_disconnected():
                    raise RequestError(499, "the client has gone")

    async def _stream(
        self, request: Request, updates: "asyncio.Queue[Update]", frame: "Frame", usage: bool
    ) -> AsyncIterator[str]:
        try:
            if frame.chat:
                yield event(frame.piece({"role": "assistant", "content": ""}))
            update = Update()
            while update.reason is None:
                update = await updates.get()
                if update.reason == "error":
                    yield event({"error": {"message": update.error, "type": "server_error"}})
                    return
                if update.text:
                    yield event(frame.piece({"content": update.text}))
            yield event(frame.piece({}, update.reason))
            if usage:
                yield event(frame.usage_piece(update))
            yield "data: [DONE]\n\n"
        finally:  # if the client disconnects, the server closes this generator
            self._batcher.cancel(request)

    def _read_options(self, body: SamplingBody, prompt_length: int, limit: int | None) -> GenerationOptions:
        for name, value in (body.model_extra or {}).items():
            if name not in _HARMLESS and value not in _NEUTRAL:
                raise RequestError(400, f"{name} is not supported by this server")
        if body.n not in (None, 1):
            raise RequestError(400, f"n is {body.n}; one answer a request is given")
        room = self._batcher.max_positions - prompt_length
        if room < 1:
            raise RequestError(400, f"a prompt of {prompt_length} tokens is beyond the model's {room + prompt_length}")
        stop = [body.stop] if isinstance(body.stop, str) else body.stop
        defaults = self._defaults
        given: dict[str, Any] = {
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "min_p": body.min_p,
            "repetition_penalty": body.repetition_penalty,
            "seed": body.seed,
            "stop": None if stop is None else tuple(stop),
            "max_new_tokens": min(defaults.max_new_tokens, room) if limit is None else limit,
        }
        chosen = {name: getattr(defaults, name) if value is None else value for name, value in given.items()}
        return GenerationOptions(**chosen)


class Frame:
    """The JSON around the text of one answer."""

    def __init__(self, model_name: str, prompt_tokens: int, chat: bool) -> None:
        self.chat = chat
        self._prompt_tokens = prompt_tokens
        self._head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": model_name,
        }

    def whole(self, text: str, last: Update) -> dict[str, Any]:
        """An answer that is not streamed."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": last.reason, "logprobs": None}
        choice |= {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head, "object": kind, "choices": [choice], "usage": self._usage(last)}

    def piece(self, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
        """An event with a piece of the answer, or with its end."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        choice |= {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        return {**self._head, "object": self._event_kind(), "choices": [choice]}

    def usage_piece(self, last: Update) -> dict[str, Any]:
        """The event with token counts."""
        return {**self._head, "object": self._event_kind(), "choices": [], "usage": self._usage(last)}

    def _event_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _usage(self, last: Update) -> dict[str, int]:
        prompt, answer = self._prompt_tokens, last.num_tokens
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
