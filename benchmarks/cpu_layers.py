"""RMSNorm and SwiGLU as they are trained on a CPU, beside torch's own: seconds, and bytes kept for the backward pass.

    python benchmarks/cpu_layers.py [--tokens 2720]

Forward and backward of one norm and one feed-forward of minimind3, ours and torch's in turns in one process. A ratio is
torch's over ours in the same round: above 1 ours is faster, or keeps less.
"""

import copy
import statistics
from collections.abc import Callable

import torch
import tyro
from harness import Claim, ratios, report, time_rounds
from torch import Tensor, nn

from minimind.config.run_config import preset
from minimind.distributed.cpu_tuning import keep_freed_memory
from minimind.model import layers
from minimind.model.kernels.apply import apply_kernels


def main(tokens: int = 2720, rounds: int = 9) -> None:
    """Measure on `tokens` rows."""
    keep_freed_memory()  # as `minimind.train` does
    config = preset("minimind3")
    claims, measured = [], {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, module in (
            ("RMSNorm", layers.RMSNorm(config.hidden_size, config.rms_norm_eps)),
            ("feed-forward", layers.FeedForward(config, config.feed_forward_size)),
        ):
            x = torch.randn(tokens, config.hidden_size, dtype=dtype, requires_grad=True)
            ways: dict[str, nn.Module] = {"torch": module.to(dtype), "ours": copy.deepcopy(module)}
            apply_kernels(ways["ours"], "cpu")
            seconds = time_rounds({way: step_of(each, x) for way, each in ways.items()}, rounds)
            kept = {way: kept_bytes(each, x) for way, each in ways.items()}
            title = f"{name}, {str(dtype).removeprefix('torch.')}, {tokens} x {config.hidden_size}: torch's over ours"
            claims.append(Claim(f"{title}, seconds", ratios(seconds["torch"], seconds["ours"]), unit="x"))
            claims.append(Claim(f"{title}, bytes kept", (kept["torch"] / kept["ours"],), unit="x"))
            milliseconds = {way: 1e3 * statistics.median(values) for way, values in seconds.items()}
            measured[title] = {"milliseconds": milliseconds, "bytes": kept}
    report(__file__, claims, measured)


def step_of(module: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward and backward."""

    def step() -> None:
        x.grad = None
        module.zero_grad()
        module(x).sum().backward()

    return step


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    """What autograd keeps of a forward besides the weights, each storage once."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = module(x)
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    assert outputs.requires_grad
    return sum(size for place, size in kept.items() if place not in weights)


if __name__ == "__main__":
    tyro.cli(main)
