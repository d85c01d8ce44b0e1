"""MiniMind on DeepSpeed: a plain PyTorch language model, trained by DeepSpeed from outside."""

__version__ = "0.1.0"
