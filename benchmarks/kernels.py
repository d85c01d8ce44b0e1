"""The kernels of a CPU beside the plain model, in training: seconds, and bytes kept for the backward pass.

python benchmarks/kernels.py [--tokens 2720]
"""

import copy
import dataclasses
import statistics
from collections.abc import Callable, Iterator

import torch
import tyro
from harness import Claim, ratios, report, time_rounds
from torch import Tensor, nn

from minimind.config.run_config import preset
from minimind.distributed.cpu_tuning import keep_freed_memory
from minimind.model import MiniMindForCausalLM, layers
from minimind.model.kernels.apply import apply_kernels

Forward = Callable[[nn.Module], Tensor]


def main(tokens: int = 2720, rounds: int = 9) -> None:
    """Measure on `tokens` rows."""
    keep_freed_memory()  # as `minimind.train` does
    claims, measured = [], {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, module, forward in cases(tokens, dtype):
            ways = {"plain": module.to(dtype), "kernels": copy.deepcopy(module)}
            apply_kernels(ways["kernels"], "cpu")
            seconds = time_rounds({way: step_of(each, forward) for way, each in ways.items()}, rounds)
            kept = {way: kept_bytes(each, forward) for way, each in ways.items()}
            title = f"{name}, {str(dtype).removeprefix('torch.')}, {tokens} tokens: plain over kernels"
            claims.append(Claim(f"{title}, seconds", ratios(seconds["plain"], seconds["kernels"]), unit="x"))
            claims.append(Claim(f"{title}, bytes kept", (kept["plain"] / kept["kernels"],), unit="x"))
            milliseconds = {way: 1e3 * statistics.median(values) for way, values in seconds.items()}
            measured[title] = {"milliseconds": milliseconds, "bytes": kept}
    report(__file__, claims, measured)


def cases(tokens: int, dtype: torch.dtype) -> Iterator[tuple[str, nn.Module, Forward]]:
    """(name, plain module, what is trained): the sum of a layer's output, or a model's loss."""
    config = preset("minimind3")
    x = torch.randn(tokens, config.hidden_size, dtype=dtype)

    def layer(module: nn.Module) -> Tensor:
        return module(x.detach().requires_grad_()).sum()

    yield "RMSNorm", layers.RMSNorm(config.hidden_size, config.rms_norm_eps), layer
    yield "feed-forward", layers.FeedForward(config, config.feed_forward_size), layer
    ids = torch.randint(3, config.vocab_size, (8, tokens // 8))
    borders = torch.arange(0, ids.numel() + 1, tokens // 16, dtype=torch.int32)
    experts = {"num_experts": 16, "moe_intermediate_size": 512}
    for name, options in (("minimind3", {}), ("minimind3-moe", experts)):
        shape = dataclasses.replace(preset(name), num_hidden_layers=2, **options)
        for documents, cu_seqlens in (("", None), (", documents of half a row", borders)):
            yield (
                f"{name}, 2 layers{documents}",
                MiniMindForCausalLM(shape),
                lambda model, cu_seqlens=cu_seqlens: model(ids, ids, cu_seqlens=cu_seqlens).loss,
            )


def step_of(module: nn.Module, forward: Forward) -> Callable[[], None]:
    """Forward and backward."""

    def step() -> None:
        module.zero_grad()
        forward(module).backward()

    return step


def kept_bytes(module: nn.Module, forward: Forward) -> int:
    """What autograd keeps of a forward besides the weights, each storage once."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = forward(module)
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    assert outputs.requires_grad
    return sum(size for place, size in kept.items() if place not in weights)


if __name__ == "__main__":
    tyro.cli(main)
