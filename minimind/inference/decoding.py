"""Decode a batch of prompts: read once into a KV cache, then one forward pass a token.

Prompts of different lengths are padded on the left and masked, so each row gets the same tokens as alone.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from minimind.errors import UserError
from minimind.inference.sampling import Sampler, SamplingOptions
from minimind.model import CausalLMOutput, KVCache, MiniMindForCausalLM


class Decoding:
    """The continuation of a batch of prompts. The model must be in evaluation mode.

    Args:
        prompts: token ids, each row at least one.
        sampling: options for each row.
        max_new_tokens: a row ends after this many.
        stop_token_ids: a row ends before any of these.
        vocab_size: larger ids are never drawn; None: the model's.

    Raises:
        UserError: an empty prompt, a token id outside the vocabulary, or more tokens than the model has positions.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: MiniMindForCausalLM,
        prompts: Sequence[Sequence[int]],
        sampling: Sequence[SamplingOptions],
        *,
        max_new_tokens: int,
        stop_token_ids: Iterable[int] = (),
        vocab_size: int | None = None,
    ) -> None:
        config = model.config
        longest = check_prompts(prompts, config.vocab_size, config.max_position_embeddings, max_new_tokens)
        weight = model.lm_head.weight
        self._model = model
        self._stop_token_ids = frozenset(stop_token_ids)
        self._left = [max_new_tokens] * len(prompts)  # tokens that each row may still get; 0: ended
        self._sampler = Sampler(
            sampling, prompts, min(vocab_size or config.vocab_size, config.vocab_size), weight.device
        )
        # The last token is never read, so one position stays empty: a step that saw the full tensors would make
        # torch.compile compile once more.
        capacity = longest + max_new_tokens
        self._cache = KVCache(config, len(prompts), capacity, weight.device, weight.dtype)
        padded = [[config.pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        self._unread = torch.tensor(padded, device=weight.device)  # (B, T): what the next forward reads
        self._mask: Tensor | None = None  # (B, capacity), only where something is padded
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=weight.device)
        if min(map(len, prompts)) < longest:
            self._mask = (torch.arange(capacity, device=weight.device) >= longest - lengths[:, None]).long()

    @property
    def is_done(self) -> bool:
        """Whether every row has ended."""
        return not any(self._left)

    def end(self, row: int) -> None:
        """End a row early."""
        self._left[row] = 0

    @torch.inference_mode()
    def step(self) -> list[int | None]:
        """One more token for each row; None for a row that ends without one, or has already ended."""
        first = self._cache.length == 0
        seen = self._cache.length + self._unread.shape[1]
        mask = None if self._mask is None else self._mask[:, :seen]
        # The prompts bypass a compiled model (nn.Module.compile): only the later steps all have one shape.
        forward: Callable[..., CausalLMOutput] = self._model.forward if first else self._model
        scores = forward(self._unread, attention_mask=mask, cache=self._cache, logits_to_keep=1).logits
        assert scores is not None  # there always are logits without labels
        logits = scores[:, -1]  # (B, vocab_size)
        if first and not bool(logits.isfinite().all()):
            raise UserError("the model's scores are NaN or infinite: its weights are damaged or its training diverged")
        drawn = self._sampler.draw(logits)
        self._unread = drawn[:, None]
        tokens: list[int | None] = []
        for row, token in enumerate(drawn.tolist()):
            if token in self._stop_token_ids:
                self._left[row] = 0
            tokens.append(token if self._left[row] else None)
            self._left[row] = max(0, self._left[row] - 1)
        return tokens


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int, max_positions: int, max_new_tokens: int) -> int:
    """The length of the longest prompt. Raises `UserError` when the prompts cannot be continued."""
    if not prompts or not all(prompts):
        raise UserError("an empty prompt cannot be continued: give at least one token")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    for token_id in (max(map(max, prompts)), min(map(min, prompts))):
        if not 0 <= token_id < vocab_size:
            raise UserError(f"the prompt has token id {token_id}, the model's vocabulary has {vocab_size}")
    longest = max(map(len, prompts))
    if longest + max_new_tokens > max_positions:
        raise UserError(
            f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens} are beyond the model's {max_positions} "
            "positions: shorten one, or stretch the context with --rope-scaling-factor"
        )
    return longest
