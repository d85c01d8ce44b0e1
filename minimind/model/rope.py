"""Rotary positions (arXiv 2104.09864) in the half-rotation form, and what stretches them: YaRN (arXiv 2309.00071),
Llama 3's way (arXiv 2407.21783), linear interpolation (arXiv 2306.15595).

No state at all: the tables are computed from integer positions in each forward, once for all layers, in float32. So
neither a cast of the module to bfloat16 nor a start on the meta device can spoil them. Refuses to know of attention.
"""

import math

import torch
from torch import Tensor

from minimind.accelerator import widest_float
from minimind.model.config import ModelConfig


def inverse_frequencies(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """Radians a position for each pair of dimensions, (head_size / 2,), in float64 where there is, scaling applied."""
    size, dtype = config.head_size, torch.float64 if device is None else widest_float(device)
    exponents = torch.arange(0, size, 2, dtype=dtype, device=device) / size
    frequencies = config.rope_theta**-exponents
    if config.rope_scaling_factor == 1:
        return frequencies
    stretched = frequencies / config.rope_scaling_factor
    if config.rope_scaling_type == "linear":
        return stretched
    # 0: fast pairs, kept as trained; 1: slow pairs, stretched over the longer context; between them a ramp.
    if config.rope_scaling_type == "llama3":  # over the turns of a pair within the trained context
        turns = frequencies * config.trained_length / (2 * math.pi)
        ramp = (config.rope_beta_fast - turns) / (config.rope_beta_fast - config.rope_beta_slow)
    else:  # over the pairs
        low = max(math.floor(_pair_that_makes(config.rope_beta_fast, config)), 0)
        high = min(math.ceil(_pair_that_makes(config.rope_beta_slow, config)), size - 1)
        pairs = torch.arange(size // 2, dtype=dtype, device=device)
        ramp = (pairs - low) / max(high - low, 0.001)
    ramp = ramp.clamp(0, 1)
    return frequencies * (1 - ramp) + stretched * ramp


def _pair_that_makes(turns: float, config: ModelConfig) -> float:
    """Index of the pair of dimensions that makes `turns` turns within the context of training."""
    positions = config.trained_length / (turns * 2 * math.pi)
    return config.head_size * math.log(positions) / (2 * math.log(config.rope_theta))


def attention_factor(config: ModelConfig) -> float:
    """YaRN's scale of rotated queries and keys (its square is the temperature of the softmax); 1 without YaRN."""
    if config.rope_attention_factor is not None:
        return config.rope_attention_factor
    return 0.1 * math.log(config.rope_scaling_factor) + 1 if config.rope_scaling_type == "yarn" else 1.0


def rotary_tables(config: ModelConfig, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of `position_ids` (..., T), each (..., T, 1, head_size) float32.

    The first half of the sines carries the minus sign of the rotation, so that it is one product and one sum.
    """
    frequencies = inverse_frequencies(config, position_ids.device)
    # cos(-a) = cos(a) and sin(-a) = -sin(a): the sign of the frequency is the sign of the sine.
    angles = position_ids[..., None, None] * torch.cat((-frequencies, frequencies))
    cos, sin = angles.cos(), angles.sin()
    factor = attention_factor(config)
    if factor != 1:
        cos, sin = cos * factor, sin * factor
    return cos.float(), sin.float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + head_size / 2]) by its angle.

    `x` (B, T, num_heads, head_size) of any dtype; tables from `rotary_tables`; the answer is float32 like them.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
