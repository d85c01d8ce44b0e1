"""Serve many clients with one model: a bounded queue, and a thread that decodes waiting requests as one batch.

Each request keeps its own sampling, length and stop texts, and gets the same answer as alone. A cancelled request
leaves the queue or its batch at once.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from minimind.data.tokenizer import Tokenizer
from minimind.errors import UserError
from minimind.inference.decoding import Decoding, check_prompts
from minimind.inference.generation import GenerationOptions, end_tokens
from minimind.inference.text_stream import TextStream
from minimind.model import MiniMindForCausalLM


@dataclass(frozen=True)
class Update:
    """Progress of a request: more text, and at the end the reason, or an error."""

    text: str = ""
    reason: str | None = None
    """"stop", "length" or "error"; None: more follows."""
    num_tokens: int = 0
    """Tokens generated so far."""
    error: str = ""


@dataclass(eq=False)
class Request:
    """One prompt to continue. The batching thread calls `deliver` in order until an update has a reason."""

    prompt: list[int]
    options: GenerationOptions
    deliver: Callable[[Update], object]
    is_cancelled: bool = False
    _tokens: int = field(default=0, repr=False)


class QueueFull(Exception):
    """The queue is at its limit."""


class Batcher:
    """One thread that owns the model. `close` ends it; unfinished requests get an error.

    Args:
        max_batch_size: requests decoded together.
        max_waiting: requests that may wait in the queue.
    """

    def __init__(
        self, model: MiniMindForCausalLM, tokenizer: Tokenizer, *, max_batch_size: int, max_waiting: int
    ) -> None:
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._max_batch_size = max_batch_size
        self._max_waiting = max_waiting
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._serve, name="batching", daemon=True)
        self._thread.start()

    @property
    def max_positions(self) -> int:
        """Limit of prompt and answer together, in tokens."""
        return self._model.config.max_position_embeddings

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            UserError: the prompt cannot be continued.
            QueueFull: the queue is at its limit.
        """
        vocab_size = self._model.config.vocab_size
        check_prompts([request.prompt], vocab_size, self.max_positions, request.options.max_new_tokens)
        with self._changed:
            if self._is_closed or len(self._waiting) >= self._max_waiting:
                raise QueueFull
            self._waiting.append(request)
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """The client has gone: free the place of its request."""
        request.is_cancelled = True
        with self._changed, contextlib.suppress(ValueError):
            self._waiting.remove(request)

    def close(self) -> None:
        """End the thread after the current step."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()
        for request in self._waiting:
            request.deliver(Update(reason="error", error="the server is shutting down"))

    def _serve(self) -> None:
        while batch := self._next_batch():
            try:
                self._run(batch)
            except UserError as error:
                self._fail(batch, str(error))
            except Exception as error:  # one bad batch must not end the server
                self._fail(batch, f"{type(error).__name__}: {error}")

    def _next_batch(self) -> list[Request]:
        """The oldest requests that fit together; waits for one. Empty after `close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            batch: list[Request] = []
            longest = most = 0
            while self._waiting and len(batch) < self._max_batch_size and not self._is_closed:
                longest = max(longest, len(self._waiting[0].prompt))
                most = max(most, self._waiting[0].options.max_new_tokens)
                if longest + most > self.max_positions:
                    break
                batch.append(self._waiting.popleft())
            return batch

    def _run(self, batch: list[Request]) -> None:
        options = [request.options for request in batch]
        decoding = Decoding(
            self._model,
            [request.prompt for request in batch],
            options,
            max_new_tokens=max(option.max_new_tokens for option in options),
            stop_token_ids=end_tokens(self._tokenizer),
            vocab_size=self._tokenizer.vocab_size,
        )
        streams = [TextStream(self._tokenizer, request.prompt, request.options.stop) for request in batch]
        running = set(range(len(batch)))
        while running and not self._is_closed:
            tokens = decoding.step()
            for row in sorted(running):
                if self._advance(batch[row], streams[row], tokens[row]):
                    decoding.end(row)
                    running.discard(row)
        self._fail([batch[row] for row in running], "the server is shutting down")

    @staticmethod
    def _advance(request: Request, stream: TextStream, token: int | None) -> bool:
        """Take one row's token; returns whether the row has ended."""
        if request.is_cancelled:
            return True
        text = ""
        if token is not None:
            request._tokens += 1
            text = stream.push(token)
        reason = None
        if token is None or stream.is_stopped:
            reason = "stop"
        elif request._tokens == request.options.max_new_tokens:
            reason = "length"
        if reason is not None:
            text += stream.finish()
        if text or reason:
            request.deliver(Update(text, reason, request._tokens))
        return reason is not None

    @staticmethod
    def _fail(batch: list[Request], message: str) -> None:
        for request in batch:
            request.deliver(Update(reason="error", num_tokens=request._tokens, error=message))
