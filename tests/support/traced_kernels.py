"""Count the kernels that a GPU would start for one block and for the loss: eagerly, and compiled.

Runs on a simulated GPU, where torch's compiler writes the code that it would give to Triton: nothing is computed, and
Triton isn't needed. `python tests/support/simulated_device python tests/support/traced_kernels.py` prints the counts.
"""

import json
import re
import unittest.mock
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from minimind.model import PRESETS
from minimind.model.attention_mask import AttentionMask
from minimind.model.kernels.apply import apply_kernels
from minimind.model.kernels.compiled import fused_chunk_loss
from minimind.model.loss import LMHead
from minimind.model.transformer import Block
from minimind.parallel.compilation import tune_compiler

CONFIG = PRESETS["minimind3"]
BATCH_SIZE, LENGTH = 8, 2048
NO_KERNEL = ("aten.empty", "aten.detach", "aten._unsafe_view", "prim.")
PRODUCTS = ("mm", "flash")  # matrix products and attention: what is no pass over memory alone
Run = Callable[[Callable[..., Any]], Any]
LAUNCH = re.compile(r"(triton_\w+)\.run\(|extern_kernels\.(\w+)\(|= torch\.ops\.aten\.(\w+)\.|\.(sum)\(dim=")


class Eager(TorchDispatchMode):
    """Counts the operators that are no views, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and not str(func).startswith(NO_KERNEL):
            self.kernels[str(func)] += 1
        return func(*args, **(kwargs or {}))


class OneKernel(torch.autograd.Function):
    """An operator for which CUDA has a kernel of its own, and in the backward one for each input."""

    @staticmethod
    def forward(ctx: Any, kernels: Counter[str], x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.kernels = kernels
        kernels["fused"] += 1
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        ctx.kernels["fused"] += len(ctx.saved_tensors)
        return None, *map(torch.empty_like, ctx.saved_tensors)


def flash(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, **_: Any) -> Tensor:
    """Attention by the kernel that a GPU takes in bf16."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[0]


def written_out(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
    """The norm as torch writes it where no kernel has it whole."""
    wide = x.float()
    return (wide * wide.pow(2).mean(-1, keepdim=True).add(eps).rsqrt() * weight).to(x.dtype)


def make_block() -> Run:
    """Runs a block of `CONFIG` in bf16, forward and backward."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        block = Block(CONFIG, 0)
        x = torch.empty(BATCH_SIZE, LENGTH, CONFIG.hidden_size, requires_grad=True)
        rotary = tuple(torch.empty(LENGTH, 1, CONFIG.head_size, dtype=torch.float32) for _ in range(2))
    torch.set_default_dtype(before)
    apply_kernels(block, "cuda")

    def run(forward: Callable[..., Tensor]) -> None:
        outputs = forward(block, x, rotary, AttentionMask())
        outputs.backward(torch.empty_like(outputs))

    return run


def make_loss() -> Run:
    """Runs the loss of a chunk of logits, with its gradient."""
    logits = torch.empty(4096, CONFIG.vocab_size, dtype=torch.bfloat16, device="cuda")
    targets, counts = (torch.empty(4096, dtype=dtype, device="cuda") for dtype in (torch.long, torch.bool))
    return lambda chunk_loss: chunk_loss(logits, targets, counts, 0.0, True)


def count_eager(make: Callable[[], Run], function: Callable[..., Any], *, fused: bool) -> Counter[str]:
    """Kernels of `make()(function)`, operator by operator.

    Args:
        fused: norm and SiLU are one kernel, as CUDA has them; otherwise what a trace sees of them.
    """
    counted = Eager()
    kernels = counted.kernels
    own = {
        "rms_norm": lambda x, shape, weight, eps: OneKernel.apply(kernels, x, weight),
        "silu": lambda x: OneKernel.apply(kernels, x),
    }
    with FakeTensorMode(), unittest.mock.patch.dict(vars(F), own if fused else {"rms_norm": written_out}):
        run = make()
        with counted:
            run(function)
    return kernels


class Written(Exception):
    """The compiler has written its code."""


def count_compiled(make: Callable[[], Run], function: Callable[..., Any]) -> list[Counter[str]]:
    """Kernels of `make()(compiled function)`, one count for each graph: forward, then backward."""
    from torch._inductor import compile_fx, config, graph, scheduler

    found: list[Counter[str]] = []

    def write(lowered: Any) -> None:
        code = lowered.codegen()[0].value
        launches = LAUNCH.findall(code[code.rindex("def call(") : code.rindex("def benchmark_compiled_module")])
        found.append(Counter("".join(names) for names in launches))
        raise Written

    def compile_graph(module: Any, inputs: Any, **options: Any) -> Callable[..., Any]:
        (outputs,) = next(iter(reversed(module.graph.nodes))).args
        values = [getattr(node, "meta", {}).get("val") for node in outputs]
        try:
            compile_fx.compile_fx_inner(module, inputs, **options)
        except Exception as error:
            if not isinstance(getattr(error, "inner_exception", error), Written):
                raise

        def call(arguments: list[Any]) -> list[Any]:
            arguments.clear()
            return [torch.empty_like(one, device=one.device) if isinstance(one, Tensor) else one for one in values]

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    torch._dynamo.reset()
    compiled = torch.compile(
        function, backend=lambda module, inputs: compile_fx.compile_fx(module, inputs, inner_compile=compile_graph)
    )
    with (
        config.patch(fx_graph_cache=False, compile_threads=1),
        torch._functorch.config.patch(enable_autograd_cache=False),
        unittest.mock.patch.object(graph.GraphLowering, "compile_to_module", write),
        unittest.mock.patch.object(scheduler, "has_triton", lambda: True),
        unittest.mock.patch("torch.utils._triton.triton_hash_with_backend", lambda: ""),
    ):
        make()(compiled)
    return found


def count_all() -> dict[str, Any]:
    """The kernels of block and loss: `[all, those of them that are no products and no attention]`."""

    def numbers(kernels: Counter[str]) -> list[int]:
        others = sum(n for name, n in kernels.items() if not any(part in name for part in PRODUCTS))
        return [kernels.total(), others]

    tune_compiler()
    with unittest.mock.patch.object(F, "scaled_dot_product_attention", flash):
        graphs = count_compiled(make_block, Block.forward)
        return {
            "graphs of a block": len(graphs),
            "block, eager, as traced": numbers(count_eager(make_block, Block.forward, fused=False)),
            "block, eager, with CUDA's own norm": numbers(count_eager(make_block, Block.forward, fused=True)),
            "block, compiled": numbers(sum(graphs, Counter())),
            "loss, eager": numbers(count_eager(make_loss, LMHead.chunk_loss, fused=False)),
            "loss, compiled": numbers(sum(count_compiled(make_loss, fused_chunk_loss), Counter())),
        }


if __name__ == "__main__":
    print(json.dumps(count_all(), indent=1))
