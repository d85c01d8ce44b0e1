"""The MiniMind language model in plain PyTorch: its shape, its modules, its loss, its files.

Knows nothing of DeepSpeed, of ranks or of command lines.
"""

from minimind.model.config import ModelConfig
from minimind.model.kv_cache import KVCache
from minimind.model.presets import PRESETS
from minimind.model.transformer import CausalLMOutput, MiniMindForCausalLM

__all__ = ["PRESETS", "CausalLMOutput", "KVCache", "MiniMindForCausalLM", "ModelConfig"]
