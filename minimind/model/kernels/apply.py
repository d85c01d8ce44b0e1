"""Faster kernels for a built model, applied from outside: modules exchange their class for a subclass that computes the
same in a different way, so parameters, hooks and the state of ZeRO stay as they are.

`MINIMIND_KERNELS` in the environment chooses: unset or `all` applies every kernel that fits the device, `plain` none,
`-norm,-swiglu` all but these, `norm,swiglu` only these.
"""

import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import nn

from minimind.errors import UserError
from minimind.model.attention import Attention
from minimind.model.kernels import matmul
from minimind.model.kernels.attention import FastAttention, FastMiniMindModel
from minimind.model.kernels.experts import CpuExperts, GroupedExperts
from minimind.model.kernels.layers import FastFeedForward, FastRMSNorm
from minimind.model.kernels.matmul import FastLinear, FastLMHead, FastLoRALinear
from minimind.model.layers import FeedForward, Linear, RMSNorm
from minimind.model.lora import LoRALinear
from minimind.model.loss import LMHead
from minimind.model.moe import Experts
from minimind.model.transformer import MiniMindModel

VARIABLE = "MINIMIND_KERNELS"


class Kernel(NamedTuple):
    """One replacement."""

    name: str
    """What `MINIMIND_KERNELS` calls it; what belongs together has one name."""
    plain: type[nn.Module]
    fast: type[nn.Module]
    """A subclass of `plain` without state of its own."""
    fits: Callable[[torch.device], bool]
    """Whether it is meant for this device."""


def on_cpu(device: torch.device) -> bool:
    """Whether the device is a CPU."""
    return device.type == "cpu"


def on_gpu(device: torch.device) -> bool:
    """Whether the device is a GPU."""
    return device.type == "cuda"


def _on_cpu_with_slow_products(device: torch.device) -> bool:
    is_fast = all(map(matmul.has_fast_matmul, (torch.bfloat16, torch.float16))) and not matmul.is_onednn_faster()
    return on_cpu(device) and not is_fast


KERNELS = (
    Kernel("matmul", Linear, FastLinear, _on_cpu_with_slow_products),
    Kernel("matmul", LoRALinear, FastLoRALinear, _on_cpu_with_slow_products),
    Kernel("loss", LMHead, FastLMHead, on_cpu),
    Kernel("norm", RMSNorm, FastRMSNorm, on_cpu),
    Kernel("swiglu", FeedForward, FastFeedForward, on_cpu),
    Kernel("attention", Attention, FastAttention, lambda device: on_cpu(device) or on_gpu(device)),
    Kernel("attention", MiniMindModel, FastMiniMindModel, lambda device: on_cpu(device) or on_gpu(device)),
    Kernel("experts", Experts, CpuExperts, on_cpu),
    Kernel("experts", Experts, GroupedExperts, on_gpu),
)
NAMES = (*dict.fromkeys(kernel.name for kernel in KERNELS), "packed", "graphs")
"""What can be chosen. `packed`: the layouts of `packed_weights.prepare_decoding`. `graphs`: CUDA graphs in decoding."""


def chosen_kernels() -> set[str]:
    """The names that `MINIMIND_KERNELS` leaves on.

    Raises:
        UserError: it has a value that is neither `all`, `plain` nor a list of names.
    """
    value = os.environ.get(VARIABLE, "").strip() or "all"
    if value in ("all", "plain"):
        return set(NAMES) if value == "all" else set()
    given = [name.strip() for name in value.split(",")]
    names = {name.removeprefix("-") for name in given}
    if not names <= set(NAMES) or len({name.startswith("-") for name in given}) > 1:
        raise UserError(
            f"{VARIABLE}={value!r}: use all, plain, a comma-separated list of {', '.join(NAMES)} to apply only these, "
            "or the same with a minus before every name to leave these out"
        )
    return set(NAMES) - names if given[0].startswith("-") else names


def apply_kernels(model: nn.Module, device: torch.device | str, more: Iterable[Kernel] = ()) -> None:
    """Exchange the classes of the modules in `model`, itself included, for those that fit the device.

    A second call changes nothing, or puts plain classes back where the device or `MINIMIND_KERNELS` has changed.

    Args:
        model: plain or wrapped in further modules; its parameters may be partitioned.
        more: replacements of modules that are not the model's own.
    """
    device, names = torch.device(device), chosen_kernels()
    table = (*KERNELS, *more)
    plain = {kernel.fast: kernel.plain for kernel in table}
    fast = {kernel.plain: kernel.fast for kernel in table if kernel.name in names and kernel.fits(device)}
    for module in model.modules():
        kind = plain.get(type(module), type(module))
        module.__class__ = fast.get(kind, kind)
