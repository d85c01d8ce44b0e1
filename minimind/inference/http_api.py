"""OpenAI's HTTP interface to a `Batcher`: models, completions, chat completions with server-sent events, a chat page.

A client's mistake is a 4xx with the reason; an unsupported field is refused, never ignored.
"""

import asyncio
import functools
import hmac
import itertools
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from minimind.data.chat_template import encode_chat
from minimind.data.tokenizer import Tokenizer
from minimind.errors import UserError
from minimind.inference.batching import Batcher, QueueFull, Request, Update
from minimind.inference.decoding import TokenLogprobs
from minimind.inference.generation import encode_prompt
from minimind.inference.request_bodies import ChatBody, CompletionBody, SamplingBody
from minimind.inference.sampling import GenerationOptions

PAGE = Path(__file__).with_name("chat_page")
MAX_BODY_BYTES = 1 << 20


def build_app(
    batcher: Batcher, tokenizer: Tokenizer, *, model_name: str, defaults: GenerationOptions, api_key: str | None
) -> FastAPI:
    """The application. `defaults` fill in what a request leaves out, with `max_new_tokens` cut to what fits."""
    app = FastAPI(title="MiniMind", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(RequestGuard, api_key=api_key)
    app.exception_handler(UserError)(lambda _, error: error_response(400, str(error)))
    app.exception_handler(RequestValidationError)(lambda _, error: error_response(400, describe(error)))
    app.exception_handler(StarletteHTTPException)(lambda _, error: error_response(error.status_code, str(error.detail)))
    model = {"id": model_name, "object": "model", "created": int(time.time()), "owned_by": "minimind"}

    def check_name(name: str) -> None:
        if name != model_name:
            raise HTTPException(404, f"there is no model {name!r}, only {model_name!r}")

    async def answer(
        body: SamplingBody, prompts: list[list[int]], num_logprobs: int | None, http: HTTPRequest
    ) -> Response:
        check_name(body.model or model_name)
        answers = Answers(batcher, tokenizer, model_name, defaults, body, prompts, num_logprobs)
        if not body.stream:
            return await answers.whole(http)
        return StreamingResponse(answers.stream(), media_type="text/event-stream")

    @app.get("/health")
    async def check_health() -> dict[str, Any]:
        return {"status": "ok", "waiting": batcher.num_waiting}

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> dict[str, Any]:
        check_name(name)
        return model

    @app.post("/v1/completions")
    async def complete(body: CompletionBody, http: HTTPRequest) -> Response:
        return await answer(body, [encode_prompt(tokenizer, prompt) for prompt in body.prompt], body.logprobs, http)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, http: HTTPRequest) -> Response:
        body.max_tokens = body.max_completion_tokens or body.max_tokens  # the older name
        num_logprobs = body.top_logprobs or 0 if body.logprobs else None
        return await answer(body, [encode_chat(tokenizer, body.turns())], num_logprobs, http)

    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return app


class RequestGuard:
    """Checks of every request to /v1: the API key and the size of the body.

    Plain ASGI, before a body is read; under Starlette's `BaseHTTPMiddleware` nobody learns that a client has gone.
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
    if first["type"] == "json_invalid":
        return f"the body is not JSON: {first['ctx']['error']} (character {first['loc'][-1]})"
    place = ".".join(str(part) for part in first["loc"] if part != "body") or "the body"
    message = str(first["msg"]).removeprefix("Value error, ")
    if isinstance(first["input"], str | int | float):
        message += f", not {first['input']!r:.80}"
    return f"{place}: {message}"


class Answers:
    """The answers to one HTTP request: rows in the batcher, and OpenAI's JSON around what they deliver.

    Raises:
        UserError: a prompt cannot be continued, or an option is out of range.
        HTTPException: there is no room for so many answers.
    """

    def __init__(
        self,
        batcher: Batcher,
        tokenizer: Tokenizer,
        model_name: str,
        defaults: GenerationOptions,
        body: SamplingBody,
        prompts: list[list[int]],
        num_logprobs: int | None,
    ) -> None:
        self._batcher = batcher
        self._tokenizer = tokenizer
        self._is_chat = isinstance(body, ChatBody)
        self._with_usage = bool((body.stream_options or {}).get("include_usage"))
        self._head = {
            "id": ("chatcmpl-" if self._is_chat else "cmpl-") + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": model_name,
        }
        self._updates: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self._requests: list[Request] = []
        self._with_logprobs = num_logprobs is not None
        samples = body.n or 1
        if len(prompts) * samples > batcher.max_waiting:
            asked = f"{len(prompts)} prompts with n {samples}"
            raise HTTPException(400, f"{asked} ask for more than the {batcher.max_waiting} answers that may wait")
        self._offsets = [0] * len(prompts) * samples  # characters of each answer's tokens so far
        self._prompt_tokens = sum(map(len, prompts))
        loop = asyncio.get_running_loop()
        for prompt in prompts:
            room = batcher.config.max_position_embeddings - len(prompt)
            for sample in range(samples):
                deliver = functools.partial(self._deliver, loop, len(self._requests))
                options = body.options(defaults, max(room, 1), sample)
                self._requests.append(Request(tokenizer, prompt, options, deliver, num_logprobs))
        try:
            batcher.submit(self._requests)
        except QueueFull:
            raise HTTPException(429, f"{batcher.num_waiting} requests wait already: try again later") from None

    def _deliver(self, loop: asyncio.AbstractEventLoop, index: int, update: Update) -> None:
        """The batching thread calls this."""
        loop.call_soon_threadsafe(self._updates.put_nowait, (index, update))

    async def whole(self, http: HTTPRequest) -> Response:
        """All answers in one piece."""
        collecting = asyncio.create_task(self._collect())
        leaving = asyncio.ensure_future(http.receive())  # after a body the only news is that the client has gone
        try:
            await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
            return collecting.result() if collecting.done() else error_response(499, "the client has gone")
        finally:
            collecting.cancel()
            leaving.cancel()
            self._free_places()

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events: pieces of the answers in the order in which they come."""
        try:
            for index in range(len(self._requests) if self._is_chat else 0):
                yield self._event([self._choice(index, Update(), {"delta": {"role": "assistant", "content": ""}})])
            ends: list[Update] = []
            while len(ends) < len(self._requests):
                index, update = await self._updates.get()
                if update.error:
                    yield event({"error": {"message": update.error, "type": "server_error"}})
                    return
                form = {"delta": {"content": update.text}} if self._is_chat else {"text": update.text}
                yield self._event([self._choice(index, update, form)])
                ends += [update] if update.reason else []
            if self._with_usage:
                yield self._event([], usage=self._usage(ends))
            yield "data: [DONE]\n\n"
        finally:  # if the client disconnects, the server closes this generator
            self._free_places()

    async def _collect(self) -> Response:
        found = [Update() for _ in self._requests]
        while not all(update.reason for update in found):
            index, update = await self._updates.get()
            found[index] += update
            if update.error:
                return error_response(500, update.error)
        choices = []
        for index, update in enumerate(found):
            text = (
                {"message": {"role": "assistant", "content": update.text}} if self._is_chat else {"text": update.text}
            )
            choices.append(self._choice(index, update, text))
        kind = "chat.completion" if self._is_chat else "text_completion"
        return JSONResponse({**self._head, "object": kind, "choices": choices, "usage": self._usage(found)})

    def _free_places(self) -> None:
        for request in self._requests:
            self._batcher.cancel(request)

    def _choice(self, index: int, update: Update, text: dict[str, Any]) -> dict[str, Any]:
        logprobs = self._describe_logprobs(index, update.logprobs) if self._with_logprobs else None
        return {"index": index, "finish_reason": update.reason, "logprobs": logprobs, **text}

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return event({**self._head, "object": kind, "choices": choices, **more})

    def _usage(self, ends: Sequence[Update]) -> dict[str, int]:
        prompt, answer = self._prompt_tokens, sum(update.num_tokens for update in ends)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}

    def _describe_logprobs(self, index: int, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """The model's own probabilities, before temperature and filters. Bytes that are no text alone become U+FFFD."""

        def describe(token: int, logprob: float) -> dict[str, Any]:
            content = self._tokenizer.token_bytes(token)
            return {"token": content.decode(errors="replace"), "logprob": logprob, "bytes": list(content)}

        chosen = [describe(entry.token, entry.logprob) for entry in entries]
        likeliest = [[describe(*pair) for pair in entry.likeliest] for entry in entries]
        if self._is_chat:
            return {"content": [{**one, "top_logprobs": top} for one, top in zip(chosen, likeliest, strict=True)]}
        offsets = list(itertools.accumulate((len(one["token"]) for one in chosen), initial=self._offsets[index]))
        self._offsets[index] = offsets.pop()
        return {
            "tokens": [one["token"] for one in chosen],
            "token_logprobs": [one["logprob"] for one in chosen],
            "top_logprobs": [{one["token"]: one["logprob"] for one in top} for top in likeliest],
            "text_offset": offsets,
        }


def event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
