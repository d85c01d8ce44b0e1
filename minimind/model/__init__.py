"""The MiniMind language model in plain PyTorch: its shape, its modules, its loss, its files.

What needs torch is imported at its first use: a configuration can name a model without it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from minimind.model.config import ModelConfig
from minimind.model.presets import PRESETS

if TYPE_CHECKING:
    from minimind.model.kv_cache import KVCache
    from minimind.model.transformer import CausalLMOutput, MiniMindForCausalLM

__all__ = ["PRESETS", "CausalLMOutput", "KVCache", "MiniMindForCausalLM", "ModelConfig"]

_HOMES = {"CausalLMOutput": "transformer", "KVCache": "kv_cache", "MiniMindForCausalLM": "transformer"}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'minimind.model' has no attribute {name!r}")
    return getattr(importlib.import_module(f"minimind.model.{_HOMES[name]}"), name)
