"""Greedy generation with a KV cache."""

import torch

from minimind.model import MiniMindForCausalLM
from minimind.model.kv_cache import KVCache


def continue_greedily(model: MiniMindForCausalLM, ids: list[int], count: int) -> list[int]:
    """The `count` likeliest next tokens, one after another. The prompt is read once, and then one token a forward.

    `KVCache(config, batch_size, capacity, device, dtype)`; `model(input_ids, cache=cache, logits_to_keep=1).logits`.
    """
    raise NotImplementedError
