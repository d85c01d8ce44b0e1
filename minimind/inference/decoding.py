"""Continue texts together: each prompt is read once into a KV cache, then one forward pass a token of all.

Rows join and leave between two tokens (continuous batching, the iteration-level scheduling of Orca, OSDI 2022). Rows
of different lengths end in the same column of the cache, padded on the left and masked, so each row gets the same
tokens as alone.
"""

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from minimind.errors import UserError, first_line
from minimind.inference.decoding_graph import GraphedStep, fits_graph
from minimind.inference.sampling import GenerationOptions, draw, to_device
from minimind.model import CausalLMOutput, KVCache, MiniMindForCausalLM
from minimind.model.config import ModelConfig

STEPS_BEFORE_GRAPH = 8
"""Steps that the same rows take together before theirs is captured, which takes as long as some of them."""


class TokenLogprobs(NamedTuple):
    """A drawn token with its log-probability in nats, before temperature and filters, and the likeliest tokens with
    theirs."""

    token: int
    logprob: float
    likeliest: list[tuple[int, float]]


class Row:
    """One text in progress.

    Args:
        prompt: token ids, at least one.
        stop_token_ids: the row ends before any of these; instead of the option of this name.
        num_logprobs: keep log-probabilities of each token and of so many likeliest ones; None: keep none.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        options: GenerationOptions,
        stop_token_ids: Iterable[int] = (),
        num_logprobs: int | None = None,
    ) -> None:
        self.options = options
        self.num_logprobs = num_logprobs
        self.tokens = list(prompt)
        """The prompt and what was drawn after it."""
        self.logprobs: list[TokenLogprobs] = []
        """One for each token drawn, where they are kept."""
        self.reason: str | None = None
        """Why the row has ended: "stop" or "length". Set it to end the row."""
        self.random = Random(options.seed)
        self._stop_token_ids = frozenset(stop_token_ids)
        self._prompt_length = len(self.tokens)

    @property
    def new_tokens(self) -> list[int]:
        """What was drawn."""
        return self.tokens[self._prompt_length :]

    @property
    def max_length(self) -> int:
        """Tokens of prompt and continuation, if nothing stops it earlier."""
        return self._prompt_length + self.options.max_new_tokens

    def check(self, config: ModelConfig) -> None:
        """Raise `UserError` when a model of this config cannot continue the prompt."""
        if not self.tokens:
            raise UserError("an empty prompt cannot be continued: give at least one token")
        for token in (max(self.tokens), min(self.tokens)):
            if not 0 <= token < config.vocab_size:
                raise UserError(f"the prompt has token id {token}, the model's vocabulary has {config.vocab_size}")
        if self.max_length > config.max_position_embeddings:
            raise UserError(
                f"a prompt of {self._prompt_length} tokens and max_new_tokens {self.options.max_new_tokens} are beyond "
                f"the model's {config.max_position_embeddings} positions: shorten one, or stretch the context with "
                "--rope-scaling-factor"
            )

    def take(self, token: int) -> None:
        """Add a drawn token, or end before it."""
        if token in self._stop_token_ids:
            self.reason = "stop"
            return
        self.tokens.append(token)
        if len(self.tokens) == self.max_length:
            self.reason = "length"


class _Group:
    """Rows with one KV cache. All end in its newest column; shorter ones have padding before them."""

    def __init__(self, model: MiniMindForCausalLM, rows: list[Row]) -> None:
        self.rows = rows
        weight = model.lm_head.weight
        # The last token is never read, so one position stays empty: a step that saw the full tensors would make
        # torch.compile compile once more.
        capacity = max(row.max_length for row in rows)
        self.cache = KVCache(model.config, len(rows), capacity, weight.device, weight.dtype)
        self._num_plain = 0
        self._graph: GraphedStep | None = None

    def read(self, forward: Callable[..., CausalLMOutput], padding_id: int) -> Tensor:
        """Read what is not in the cache yet; returns the logits (B, V) after each row's newest token."""
        device, length = self.cache.keys.device, max(len(row.tokens) for row in self.rows)
        num_new = length - self.cache.length
        if self._graph is not None:
            return self._graph([row.tokens[-1] for row in self.rows])
        unread = [row.tokens[-num_new:] for row in self.rows]
        padded = [[padding_id] * (num_new - len(ids)) + ids for ids in unread]
        input_ids = to_device(padded, device, torch.long)
        padding = [length - len(row.tokens) for row in self.rows]
        mask = None
        if any(padding):
            starts = to_device(padding, device, torch.long)
            mask = (torch.arange(length, device=device) >= starts[:, None]).long()
        logits = forward(input_ids, attention_mask=mask, cache=self.cache, logits_to_keep=1).logits
        assert logits is not None  # there always are, without labels
        return logits[:, -1]

    def settle(self, model: MiniMindForCausalLM) -> None:
        """Take a graph for the steps from here on, where the rows stay together and a graph can be had."""
        self._num_plain += 1
        if self._num_plain > STEPS_BEFORE_GRAPH and self._graph is None and fits_graph(model):
            length = self.cache.length + 1  # with the newest token, which is not read yet
            try:
                self._graph = GraphedStep(model, self.cache, [length - len(row.tokens) for row in self.rows])
            except RuntimeError as error:
                self._num_plain = -sys.maxsize
                warnings.warn(f"decoding goes on without a CUDA graph: {first_line(error)}", stacklevel=2)


class Decoding:
    """The rows that a model, in evaluation mode, continues together.

    Args:
        vocab_size: larger ids are never drawn; None: the model's.
    """

    def __init__(self, model: MiniMindForCausalLM, vocab_size: int | None = None) -> None:
        self._model = model
        self._vocab_size = vocab_size or model.config.vocab_size
        self._joining: list[Row] = []
        self._groups: list[_Group] = []  # one, and for a step another with the rows that have joined

    @property
    def rows(self) -> list[Row]:
        """The rows that have not ended."""
        rows = [*(row for group in self._groups for row in group.rows), *self._joining]
        return [row for row in rows if row.reason is None]

    def join(self, rows: Sequence[Row]) -> None:
        """Add rows; the next step reads their prompts. Raises `UserError` when one cannot be continued."""
        for row in rows:
            row.check(self._model.config)
        self._joining += rows

    @torch.inference_mode()
    def step(self) -> None:
        """Give each row one more token."""
        self._settle()
        padding_id = self._model.config.pad_token_id
        for group in self._groups:
            group.settle(self._model)
        logits = [group.read(self._model, padding_id) for group in self._groups]
        if joining := [row for row in self._joining if row.reason is None]:
            self._groups.append(_Group(self._model, joining))
            # The prompts bypass a compiled model (nn.Module.compile): only the other steps all have one shape.
            logits.append(self._groups[-1].read(self._model.forward, padding_id))
            if not bool(logits[-1].isfinite().all()):
                raise UserError(
                    "the model's scores are NaN or infinite: its weights are damaged or its training diverged"
                )
        self._joining = []
        if logits:
            self._draw(torch.cat(logits), [row for group in self._groups for row in group.rows])

    def _draw(self, logits: Tensor, rows: list[Row]) -> None:
        drawn = draw(
            logits,
            [row.options for row in rows],
            [row.random for row in rows],
            [row.tokens for row in rows],
            self._vocab_size,
        )
        self._keep_logprobs(logits, rows, drawn)
        for row, token in zip(rows, drawn.tolist(), strict=True):
            row.take(token)

    def _keep_logprobs(self, logits: Tensor, rows: list[Row], drawn: Tensor) -> None:
        wanted = {place: row.num_logprobs for place, row in enumerate(rows) if row.num_logprobs is not None}
        if not wanted:
            return
        places = list(wanted)
        logprobs = logits[places].float().log_softmax(dim=-1)
        own = logprobs.gather(1, drawn[places].unsqueeze(1))[:, 0]
        values, ids = logprobs[:, : self._vocab_size].topk(max(wanted.values()))
        columns = (drawn[places].tolist(), own.tolist(), ids.tolist(), values.tolist())
        for place, token, logprob, *likeliest in zip(places, *columns, strict=True):
            pairs = list(zip(*likeliest, strict=True))[: wanted[place]]
            rows[place].logprobs.append(TokenLogprobs(token, logprob, pairs))

    def _settle(self) -> None:
        """Bring the rows that have not ended into one cache as long as the longest of them."""
        # Once: another thread may end a row at any moment.
        places = [(group, i) for group in self._groups for i, row in enumerate(group.rows) if row.reason is None]
        self._groups = list(dict.fromkeys(group for group, _ in places))
        if len(self._groups) > 1 or sum(len(group.rows) for group in self._groups) > len(places):
            merged = _Group(self._model, [group.rows[i] for group, i in places])
            merged.cache.length = end = max(len(row.tokens) for row in merged.rows) - 1
            for new, (group, old) in enumerate(places):
                last, count = group.cache.length, len(group.rows[old].tokens) - 1  # the newest token is not read yet
                ours, theirs = merged.cache, group.cache
                for target, source in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
                    target[:, new, :, end - count : end] = source[:, old, :, last - count : last]
            self._groups = [merged]


def decode(model: MiniMindForCausalLM, rows: Sequence[Row], vocab_size: int | None = None) -> Iterator[None]:
    """Continue rows until all have ended; yields after each token of all. A model in training is so again afterwards.

    Raises:
        UserError: a row cannot be continued.
    """
    decoding = Decoding(model, vocab_size)
    decoding.join(rows)
    was_training = model.training
    model.eval()
    try:
        while decoding.rows:
            decoding.step()
            yield
    finally:
        model.train(was_training)
