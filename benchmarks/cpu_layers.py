"""RMSNorm and SwiGLU as they are trained on a CPU, beside torch's own: seconds and what waits for the backward.

    python benchmarks/cpu_layers.py [--tokens 2720]

Forward and backward of one norm and one feed-forward of minimind3, ours and torch's in turns in one process. A ratio is
torch's over ours in the same round: above 1 ours is faster, or keeps less.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import tyro
from measure import Claim, environment, ratios, report
from torch import Tensor, nn

from minimind.config.run_config import preset
from minimind.distributed.cpu_tuning import keep_freed_memory
from minimind.model import layers


def main(tokens: int = 2720, rounds: int = 9, output: Path | None = None) -> None:
    """Measure.

    Args:
        tokens: rows in a micro-batch.
        rounds: turns of each.
        output: where the JSON goes.
    """
    where = environment()
    keep_freed_memory()  # as `minimind.train` does
    config = preset("minimind3")
    claims, measured = [], {}
    for dtype in (torch.float32, torch.bfloat16):
        modules: dict[str, nn.Module] = {
            "RMSNorm": layers.RMSNorm(config.hidden_size, config.rms_norm_eps),
            "feed-forward": layers.FeedForward(config, config.feed_forward_size),
        }
        for name, module in modules.items():
            module.to(dtype)
            x = torch.randn(tokens, config.hidden_size, dtype=dtype, requires_grad=True)
            seconds: dict[str, list[float]] = {"torch": [], "ours": []}
            for number in range(rounds + 1):
                for way, values in seconds.items():
                    with computed_by(way):
                        taken = time_step(module, x)
                    if number:  # the first round warms up
                        values.append(taken)
            kept = {}
            for way in seconds:
                with computed_by(way):
                    kept[way] = kept_bytes(module, x)
            title = f"{name}, {str(dtype).removeprefix('torch.')}, {tokens} x {config.hidden_size}: torch's over ours"
            claims.append(Claim(f"{title}, seconds", ratios(seconds["torch"], seconds["ours"]), unit="x"))
            claims.append(Claim(f"{title}, bytes kept", (kept["torch"] / kept["ours"],), unit="x"))
            milliseconds = {way: 1e3 * statistics.median(values) for way, values in seconds.items()}
            measured[title] = {"milliseconds": milliseconds, "bytes": kept}
    report(__file__, where, claims, measured, output)


@contextmanager
def computed_by(way: str) -> Iterator[None]:
    """Layers are torch's own meanwhile, or ours where they are meant to be."""
    real = layers.is_recomputed
    if way == "torch":
        layers.is_recomputed = lambda x: False  # type: ignore[assignment]
    try:
        yield
    finally:
        layers.is_recomputed = real


def time_step(module: nn.Module, x: Tensor) -> float:
    """Seconds of forward and backward."""
    x.grad = None
    module.zero_grad()
    began = time.perf_counter()
    module(x).sum().backward()
    return time.perf_counter() - began


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
