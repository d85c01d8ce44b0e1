"""OpenAI's HTTP interface to a `Batcher`: models, completions, chat completions with server-sent events, a chat page.

A client's mistake is a 4xx with the reason; an unsupported field is refused, never ignored.
"""

import hmac
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from minimind.data.chat_template import encode_chat
from minimind.data.tokenizer import Tokenizer
from minimind.errors import UserError
from minimind.inference.batching import Batcher
from minimind.inference.generation import encode_prompt
from minimind.inference.http_answers import Answers, error_response
from minimind.inference.request_bodies import ChatBody, CompletionBody, SamplingBody, WeightsBody
from minimind.inference.sampling import GenerationOptions
from minimind.model import MiniMindForCausalLM

PAGE = Path(__file__).with_name("chat_page")
MAX_BODY_BYTES = 1 << 20
WEIGHTS_PATH = "/collective_rpc"  # as vLLM calls it


def build_app(
    batcher: Batcher,
    tokenizer: Tokenizer,
    *,
    model_name: str,
    defaults: GenerationOptions,
    api_key: str | None,
    load: Callable[[Path], MiniMindForCausalLM] | None = None,
) -> FastAPI:
    """The application. `defaults` fill in what a request leaves out, with `max_new_tokens` cut to what fits.

    Args:
        load: loads the weights that a client asks for; None: they stay as they are.
    """
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
        if any(token < tokenizer.vocab_size for token in body.logit_bias or ()):  # others are never drawn here
            raise HTTPException(400, "logit_bias is not supported by this server")
        return await answer(body, [encode_prompt(tokenizer, prompt) for prompt in body.prompt], body.logprobs, http)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, http: HTTPRequest) -> Response:
        body.max_tokens = body.max_completion_tokens or body.max_tokens  # the older name
        num_logprobs = body.top_logprobs or 0 if body.logprobs else None
        prompt = encode_chat(tokenizer, body.turns(), body.offered, thinking=body.thinking)
        return await answer(body, [prompt], num_logprobs, http)

    if load is not None:

        @app.post(WEIGHTS_PATH)
        def take_weights(body: WeightsBody) -> dict[str, Any]:
            batcher.exchange(load(body.kwargs.weights_path))
            return {"results": [None]}

    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return app


class RequestGuard:
    """Checks of every request to /v1 and for new weights: the API key and the size of the body.

    Plain ASGI, before a body is read; under Starlette's `BaseHTTPMiddleware` nobody learns that a client has gone.
    """

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refuse(HTTPRequest(scope)) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)

    def _refuse(self, http: HTTPRequest) -> Response | None:
        if not http.url.path.startswith(("/v1/", WEIGHTS_PATH)):
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
