"""What of an engine's model is compiled by torch.compile: whole blocks, or where DeepSpeed's own layers and hooks stand
inside a block, the parts around them."""

import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.ops.triton_ops import is_triton_available
from torch import nn

from minimind.accelerator import compiles_with_triton
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import CompileMode
from minimind.errors import UserError
from minimind.model import MiniMindForCausalLM
from minimind.model.kernels.compiled import Compiler
from minimind.model.layers import FeedForward
from minimind.parallel.deepspeed_moe import NativeExperts

EXPERT_LAYERS = (AutoEPMoELayer, NativeExperts)


def find_missing_compiler(device_type: str) -> str | None:
    """What torch.compile needs on this host for such a device and does not find; None: nothing."""
    if device_type == "cpu":
        compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "c++", "clang++"]
        return None if any(map(shutil.which, compilers)) else "a C++ compiler (g++)"
    if not compiles_with_triton(device_type):
        return None
    if importlib.util.find_spec("triton") is None:
        return "Triton (pip install triton)"
    # Triton compiles the launcher of each kernel as a module of Python.
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return "a C compiler (gcc)"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    version = "{}.{}".format(*sys.version_info)
    return None if header.exists() else f"{header} (the package python{version}-dev)"


def settle_compilation(mode: CompileMode, device_type: str) -> tuple[bool, str]:
    """Whether a run compiles, and that in words.

    Raises:
        UserError: it is asked to and cannot.
    """
    if mode == "off":
        return False, "off"
    if mode == "auto" and not compiles_with_triton(device_type):
        return False, f"off, as by default on {'a CPU' if device_type == 'cpu' else device_type}"
    missing = find_missing_compiler(device_type)
    if missing is None:
        return True, "each block, at the first step"
    if mode == "on":
        raise UserError(f"compile: on, and {missing} is missing; install it, or take --compile off")
    return False, f"off: {missing} is missing"


def check_expert_kernels(resolved: ResolvedRun, device_type: str) -> None:
    """AutoEP computes with Triton wherever it is installed, which compiles at the first step.

    Raises:
        UserError: it could not.
    """
    if device_type != "cpu" and resolved.train.moe_backend == "autoep" and is_triton_available():
        missing = find_missing_compiler(device_type)
        if missing is not None:
            raise UserError(
                f"moe_backend: autoep compiles kernels, and {missing} is missing; install it, or take --moe-backend "
                "deepspeed"
            )


def compile_model(model: MiniMindForCausalLM, compiler: Compiler) -> None:
    """Let the blocks of a model be compiled at their first step, one compilation for all that are alike, and the loss.

    After `deepspeed.initialize`, whose hooks decide: a block is compiled whole but for its experts, where none of its
    parts has hooks; otherwise its attention. Of the experts' layer, the feed-forward that every token visits.
    """
    tune_compiler()
    parts: dict[str, list[nn.Module]] = {"blocks": [], "attention layers": [], "shared experts": []}
    block: Any  # a Block
    for block in model.model.layers:
        if isinstance(block.mlp, EXPERT_LAYERS) and isinstance(block.mlp.shared_experts, FeedForward):
            parts["shared experts"].append(block.mlp.shared_experts)
        if not any(map(_has_hooks, _inside(block))):
            parts["blocks"].append(block)
            if isinstance(block.mlp, EXPERT_LAYERS):
                # How many rows an expert gets is known on the host alone, and a trace of torch's grouped product knows
                # bfloat16 only.
                block.mlp.forward = torch.compiler.disable(block.mlp.forward)  # type: ignore[method-assign]
        elif not any(map(_has_hooks, _inside(block.self_attn))):
            parts["attention layers"].append(block.self_attn)
    for name, modules in parts.items():
        compiler.apply(name, modules)
    if not any(parts.values()):
        compiler.say("no layer is compiled: hooks of DeepSpeed's stand inside all of them")
    compiler.apply_to_loss(model.lm_head)


def tune_compiler() -> None:
    """Let torch's compiler keep the sums for a norm's weight apart from the norm's own backward.

    Fused with it, as by default from 5 million elements on, they keep a float32 tensor of all heads and take more
    kernels: 45 instead of 41 a block of minimind3, and by torch's own count 5% more bytes.
    """
    torch._inductor.config.triton.mix_order_reduction = False


def _inside(module: nn.Module) -> Iterator[nn.Module]:
    """The modules inside `module` that would be compiled with it: not the experts', which are left out."""
    for child in module.children():
        if not isinstance(child, EXPERT_LAYERS):
            yield child
            yield from _inside(child)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
