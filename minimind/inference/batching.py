"""Serve many clients with one model: a bounded queue, and a thread that decodes what is asked for together.

A request joins the running batch between two tokens, as soon as there is a place, and leaves it when it is done or its
client has gone. Each gets the same answer as alone.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minimind.data.tokenizer import Tokenizer
from minimind.errors import UserError
from minimind.inference.decoding import Decoding, TokenLogprobs
from minimind.inference.generation import Continuation, Prompt
from minimind.inference.sampling import GenerationOptions
from minimind.model import MiniMindForCausalLM
from minimind.model.config import ModelConfig


@dataclass(frozen=True)
class Update:
    """Progress of a request: more text, and at the end the reason, or an error."""

    text: str = ""
    reason: str | None = None
    """"stop", "length" or "error"; None: more follows."""
    num_tokens: int = 0
    """Tokens generated so far."""
    error: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Of the tokens since the last update, where they were asked for."""

    def __add__(self, later: "Update") -> "Update":
        """Both as one."""
        logprobs = self.logprobs + later.logprobs
        return Update(self.text + later.text, later.reason, later.num_tokens, later.error, logprobs)


class Request(Continuation):
    """One prompt to continue. The batching thread calls `deliver` in order until an update has a reason.

    Args:
        with_end: of the log-probabilities, deliver that of the token that ends the answer too.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Prompt,
        options: GenerationOptions,
        deliver: Callable[[Update], object],
        num_logprobs: int | None = None,
        *,
        with_end: bool = False,
    ) -> None:
        super().__init__(tokenizer, prompt, options, num_logprobs)
        self._deliver, self._with_end = deliver, with_end
        self._num_delivered = 0

    def take(self, token: int) -> None:
        """As in `Continuation`; delivers what is new."""
        if self.reason is not None:
            return  # its client went during the step
        super().take(token)
        if self.piece or self.reason:
            count = len(self.new_tokens)
            logprobs = tuple(self.logprobs[self._num_delivered : None if self._with_end else count])
            self._num_delivered = count
            self._deliver(Update(self.piece, self.reason, count, logprobs=logprobs))

    def fail(self, message: str) -> None:
        """End with an error, unless it has ended."""
        if self.reason is None:
            self.reason = "error"
            self._deliver(Update(reason="error", num_tokens=len(self.new_tokens), error=message))


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
        self.max_waiting = max_waiting
        self._model = model.eval()
        self._vocab_size = tokenizer.vocab_size
        self._max_batch_size = max_batch_size
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._serve, name="batching", daemon=True)
        self._thread.start()

    @property
    def config(self) -> ModelConfig:
        """That of the model."""
        return self._model.config

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests, all of them or none.

        Raises:
            UserError: a prompt cannot be continued.
            QueueFull: the queue has not room for them.
        """
        for request in requests:
            request.check(self.config)
        with self._changed:
            if self._is_closed or len(self._waiting) + len(requests) > self.max_waiting:
                raise QueueFull
            self._waiting += requests
            self._changed.notify()

    def exchange(self, model: MiniMindForCausalLM) -> None:
        """Answer the requests that are still to join by another model; what is running ends first. Raises `UserError`
        when it has other tokens."""
        there, here = model.config.vocab_size, self.config.vocab_size
        if there != here:
            raise UserError(f"the new weights are of {there} tokens, this server's model has {here}")
        with self._changed:
            self._model = model.eval()

    def cancel(self, request: Request) -> None:
        """The client has gone: free the place of its request."""
        request.reason = request.reason or "cancelled"
        with self._changed, contextlib.suppress(ValueError):
            self._waiting.remove(request)

    def close(self) -> None:
        """End the thread after the current step."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _serve(self) -> None:
        running: list[Request] = []
        while not self._is_closed:
            running = [request for request in running if request.reason is None]
            if not running:
                model, decoding = None, None  # the cache of the last one is freed
            joining = self._admit(running) if model in (None, self._model) else []
            running += joining
            if decoding is None:
                model = self._model
                decoding = Decoding(model, self._vocab_size)
            try:
                decoding.join(joining)
                decoding.step()
            except Exception as error:  # one bad batch must not end the server
                message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                for request in running:
                    request.fail(message)
        for request in [*running, *self._waiting]:
            request.fail("the server is shutting down")

    def _admit(self, running: list[Request]) -> list[Request]:
        """The oldest requests for which there is a place; waits for one where nothing is running."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or running or self._is_closed)
            free = self._max_batch_size - len(running)
            return [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
