"""The answers to one HTTP request: rows in a `Batcher`, and OpenAI's JSON around what they deliver."""

import asyncio
import functools
import itertools
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from fastapi import HTTPException
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response

from minimind.data.tokenizer import Tokenizer
from minimind.inference.answer_reader import AnswerReader, ToolCall, reader_after
from minimind.inference.batching import Batcher, QueueFull, Request, Update
from minimind.inference.decoding import TokenLogprobs
from minimind.inference.request_bodies import ChatBody, CompletionBody, SamplingBody
from minimind.inference.sampling import GenerationOptions


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
        self._readers: list[AnswerReader] = []  # of a chat, one for each answer
        self._with_usage = bool((body.stream_options or {}).get("include_usage"))
        self._head = {
            "id": ("chatcmpl-" if self._is_chat else "cmpl-") + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": model_name,
        }
        self._updates: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self._requests: list[Request] = []
        self._with_logprobs = num_logprobs is not None
        self._with_ids = isinstance(body, CompletionBody) and body.return_token_ids
        if self._with_ids:
            num_logprobs = num_logprobs or 0
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
                if isinstance(body, ChatBody):
                    self._readers.append(reader_after(tokenizer, prompt, body.offered))
                deliver = functools.partial(self._deliver, loop, len(self._requests))
                options = body.options(defaults, max(room, 1), sample)
                request = Request(tokenizer, prompt, options, deliver, num_logprobs, with_end=self._with_ids)
                self._requests.append(request)
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
                yield self._event([self._choice(index, {"delta": {"role": "assistant", "content": ""}})])
            ends: list[Update] = []
            while len(ends) < len(self._requests):
                index, update = await self._updates.get()
                if update.error:
                    yield event({"error": {"message": update.error, "type": "server_error"}})
                    return
                for choice in self._pieces(index, update):
                    yield self._event([choice])
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
            form: dict[str, Any] = {"text": update.text}
            reason = update.reason
            if self._is_chat:
                reader = self._readers[index]
                reader.push(update.text)
                reader.finish()
                form, reason = {"message": describe_answer(reader)}, reader.name_end(reason)
            choices.append(self._choice(index, form, update.logprobs, reason))
        kind = "chat.completion" if self._is_chat else "text_completion"
        return JSONResponse({**self._head, "object": kind, "choices": choices, "usage": self._usage(found)})

    def _pieces(self, index: int, update: Update) -> Iterator[dict[str, Any]]:
        """What an update adds to an answer, as choices of events; of a chat possibly none: text may be held back."""
        if not self._is_chat:
            yield self._choice(index, {"text": update.text}, update.logprobs, update.reason)
            return
        reader = self._readers[index]
        deltas: list[dict[str, Any]] = []
        num_calls = len(reader.calls)
        for part in reader.push(update.text) + (reader.finish() if update.reason else []):
            if part.call:
                deltas.append({"tool_calls": [{"index": num_calls, **describe_call(part.call)}]})
                num_calls += 1
            elif part.reasoning:
                deltas.append({"reasoning_content": part.reasoning})
            else:
                deltas.append({"content": part.content})
        if not deltas and (update.reason or update.logprobs):
            deltas = [{}]
        for place, delta in enumerate(deltas):
            logprobs = update.logprobs if place == 0 else ()
            reason = reader.name_end(update.reason) if place == len(deltas) - 1 else None
            yield self._choice(index, {"delta": delta}, logprobs, reason)

    def _free_places(self) -> None:
        for request in self._requests:
            self._batcher.cancel(request)

    def _choice(
        self, index: int, form: dict[str, Any], logprobs: Sequence[TokenLogprobs] = (), reason: str | None = None
    ) -> dict[str, Any]:
        described = self._describe_logprobs(index, logprobs) if self._with_logprobs else None
        if self._with_ids:  # as vLLM: with the one that ends the answer
            form["token_ids"] = [entry.token for entry in logprobs]
        return {"index": index, "finish_reason": reason, "logprobs": described, **form}

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


def describe_answer(reader: AnswerReader) -> dict[str, Any]:
    """An answer as a message, its calls with ids."""
    message = reader.message()
    if reader.calls:
        message["tool_calls"] = [describe_call(call) for call in reader.calls]
        message["content"] = message["content"] or None
    return message


def describe_call(call: ToolCall) -> dict[str, Any]:
    """A call with a new id."""
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": call._asdict()}


def event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def error_response(status: int, message: str) -> JSONResponse:
    """An error in OpenAI's form."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    headers = {"Retry-After": "1"} if status == 429 else None
    error = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": error}, status_code=status, headers=headers)
