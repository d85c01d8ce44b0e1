"""How many kernels a block of the model and its loss take on a GPU, before and after torch.compile, counted on a
simulated one: the operators that ran, and the kernels that torch's compiler writes for Triton (which need not be
installed, as none of them is run)."""

import collections
import contextlib
import dataclasses
import re
import types
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import torch
from simulated_cuda.compiler import without_stand_in
from simulated_cuda.trace import trace
from torch import Tensor, nn

from minimind.config.run_config import preset
from minimind.model import MiniMindForCausalLM
from minimind.model.kernels.apply import apply_kernels
from minimind.model.kernels.attention import DocumentMask
from minimind.model.kernels.compiled import fused_chunk_loss
from minimind.model.layers import RMSNorm
from minimind.model.rope import rotary_tables

BATCH, LENGTH = 2, 64


class _Stop(Exception):
    """Everything is compiled."""


def count_block(autocast: bool) -> dict[str, dict[str, int]]:
    """Kernels of the forward and backward of one block of minimind3 in bf16, by name: "eager" and "compiled".

    Attention is inside documents: one kernel forward and one backward, of which the eager count has none, as this
    device has no operators for them.

    Args:
        autocast: weights in float32, cast as they are used (ZeRO stage 0).
    """
    config = dataclasses.replace(preset("minimind3"), num_hidden_layers=1)
    with torch.device("cuda"):
        model = MiniMindForCausalLM(config).to(torch.float32 if autocast else torch.bfloat16)
        x = torch.randn(BATCH, LENGTH, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        rotary = rotary_tables(config, torch.arange(LENGTH))
        borders = torch.tensor([0, 40, LENGTH, BATCH * LENGTH], dtype=torch.int32)
    apply_kernels(model, "cuda")
    block: nn.Module = model.model.layers[0]
    mask = DocumentMask(cu_seqlens=borders)

    def step(forward: Callable[..., Tensor]) -> None:
        block.zero_grad()  # gradients are added up outside of what is compiled
        x.grad = None
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            output = forward(block, x, rotary, mask)
        output.backward(output)

    forward = type(block).forward
    eager = count_eager(lambda: step(forward))
    # A GPU norms in one kernel, and in two backward; here each step of it is an operator.
    norms = [module for module in block.modules() if isinstance(module, RMSNorm)]
    for norm in norms:
        rows = torch.randn(4, norm.weight.numel(), dtype=torch.bfloat16, device="cuda", requires_grad=True)
        normed = rows.detach()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            steps = count_eager(lambda norm=norm, rows=rows, normed=normed: _train_alone(norm, rows, normed))
        eager = dict(collections.Counter(eager) - collections.Counter(steps))
    eager["rms_norm"], eager["rms_norm_backward"] = len(norms), 2 * len(norms)
    return {"eager": eager, "compiled": count_compiled(step, forward)}


def _train_alone(norm: nn.Module, rows: Tensor, gradient: Tensor) -> None:
    norm.zero_grad()
    rows.grad = None
    norm(rows).backward(gradient)


def count_loss() -> dict[str, dict[str, int]]:
    """The same of the loss of a chunk of logits, with its gradient; the products are not part of it."""
    head = type(MiniMindForCausalLM(dataclasses.replace(preset("minimind3"), num_hidden_layers=1)).lm_head)
    logits = torch.randn(LENGTH, 6400, dtype=torch.bfloat16, device="cuda")
    targets = torch.arange(LENGTH, device="cuda")

    def step(loss: Callable[..., Any]) -> None:
        loss(logits, targets, torch.ones_like(targets, dtype=torch.bool), 0.0, True)

    return {"eager": count_eager(lambda: step(head.chunk_loss)), "compiled": count_compiled(step, fused_chunk_loss)}


def count_eager(step: Callable[[], None]) -> dict[str, int]:
    """The operators that ran on the device and are no mere views or allocations."""
    step()
    with trace() as counted:
        step()
    return {name: number for name, number in counted.operators.items() if _is_kernel(name)}


def _is_kernel(name: str) -> bool:
    packet = getattr(torch.ops.aten, name.removeprefix("aten::").split(".")[0])
    schema = getattr(packet, name.partition(".")[2] or "default")._schema
    is_view = any(one.alias_info is not None and not one.alias_info.is_write for one in schema.returns)
    return not is_view and not name.startswith(("aten::empty", "aten::_reshape_alias", "aten::detach"))


def count_compiled(step: Callable[[Callable[..., Any]], None], function: Callable[..., Any]) -> dict[str, int]:
    """The calls in the programs that the compiler writes for the forward and the backward."""
    programs: list[str] = []

    def stop(*_: Any) -> None:
        raise _Stop  # forward and backward are written before either runs

    def keep(graph: Any) -> types.SimpleNamespace:
        programs.append(graph.codegen()[0].value)
        graph.cache_key, graph.cache_path, graph.cache_linemap = "", "", []
        return types.SimpleNamespace(call=stop, __file__="")

    torch._dynamo.reset()
    from torch._inductor import config, graph, scheduler

    with (
        without_stand_in(),
        unittest.mock.patch.object(scheduler, "has_triton", lambda: True),
        unittest.mock.patch("torch.utils._triton.triton_hash_with_backend", lambda: ""),
        unittest.mock.patch.object(graph.GraphLowering, "compile_to_module", keep),
        config.patch(force_disable_caches=True),
        contextlib.suppress(_Stop),
    ):
        step(torch.compile(function))
    return dict(collections.Counter(call for program in programs for call in _calls(program)))


def _calls(program: str) -> Iterator[str]:
    body = program[program.index("def call(") :]
    for found in re.finditer(r"(triton_\w+)\.run\(|(extern_kernels\.\w+)\(|(torch\.ops\.[\w.]+)\(", body):
        yield next(filter(None, found.groups()))
