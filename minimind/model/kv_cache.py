"""The keys and values of the tokens a model has already read, allocated once for a whole generation.

Holds tensors and a length; refuses to know how attention uses them or when to forget.
"""

import torch
from torch import Tensor

from minimind.errors import UserError
from minimind.model.config import ModelConfig


class KVCache:
    """Keys and values of every layer for up to `max_length` tokens, (B, num_key_value_heads, max_length, head_size).

    Hand it to the model's forward with the new tokens only; the model writes them and moves `length` on. `length` is
    the number of tokens read so far, padding included, and may be set back to forget the newest tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, max_length, config.head_size)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.max_length = max_length
        self.length = 0

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new `keys` and `values` (B, num_key_value_heads, T, head_size) behind the tokens read.

        Returns that layer's keys and values of all tokens so far, (B, num_key_value_heads, length + T, head_size),
        as views. `length` stays: the model moves it on when every layer has written.
        """
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def reserve(self, num_tokens: int) -> None:
        """Raise `UserError` unless `num_tokens` more tokens fit."""
        if self.length + num_tokens > self.max_length:
            raise UserError(
                f"KV cache: {self.length} tokens read and {num_tokens} new do not fit max_length={self.max_length}; "
                "make a longer cache"
            )
