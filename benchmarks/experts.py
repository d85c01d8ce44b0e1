"""Forward and backward of a mixture-of-experts block beside a dense feed-forward of equal active operations.

python benchmarks/experts.py [--tokens 4096] [--precision fp32 bf16]
"""

import functools
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
import tyro
from harness import Claim, build_engine, has_fast_bf16, joined, ratios, report, time_rounds, workspace
from harness import transformers_model as build_theirs
from torch import Tensor, nn

from minimind.errors import UserError
from minimind.model import MiniMindForCausalLM
from minimind.model.config import ModelConfig
from minimind.model.kernels.apply import apply_kernels
from minimind.model.layers import FeedForward
from minimind.model.moe import MoEFeedForward
from minimind.model.router import route

# (experts, experts a token, share of the dense block's speed to reach): the experts of a token are as wide together as
# the dense block.
SHAPES = ((4, 1, 0.85), (16, 2, 0.8), (64, 4, 0.6))
DENSE_SIZE = 2432
Way = Callable[[Tensor], Tensor]
BACKENDS = {"autoep": "DeepSpeed AutoEP", "deepspeed": "deepspeed.moe, nothing dropped"}
SEED = 42  # the engine draws the same experts from it as the plain model


def main(tokens: int = 4096, precision: tuple[str, ...] | None = None, rounds: int = 5, hidden_size: int = 768) -> None:
    """Measure a batch of `tokens`, in fp32 and, where the device has products in it, bf16, or in `precision`."""
    claims, measured = [], {}
    for name in precision or (("fp32", "bf16") if has_fast_bf16() else ("fp32",)):
        for num_experts, top_k, target in SHAPES:
            config = ModelConfig(
                hidden_size=hidden_size, use_moe=True, num_experts=num_experts, num_experts_per_tok=top_k,
                moe_intermediate_size=DENSE_SIZE // top_k, num_hidden_layers=1,
            )  # fmt: skip
            seconds = measure_shape(config, {"fp32": torch.float32, "bf16": torch.bfloat16}[name], tokens, rounds)
            measured[f"{name}, {num_experts} experts, top {top_k}"] = seconds
            for way in [way for way in seconds if way != "dense"]:
                title = f"experts, {name}, {num_experts} experts, top {top_k}: {way}"
                goal = target if way == "ours" else None
                claims.append(Claim(title, ratios(seconds["dense"], seconds[way]), goal, unit="x of dense"))
    report(__file__, claims, measured)


def measure_shape(config: ModelConfig, dtype: torch.dtype, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of forward and backward of each way, round by round."""
    with workspace() as folder, joined() as (env, device):
        with device:
            torch.manual_seed(SEED)
            model = MiniMindForCausalLM(config)
            theirs = build_theirs(config, experts_implementation="grouped_mm")
        theirs.load_state_dict(model.state_dict())
        apply_kernels(model, device)
        block = model.model.layers[0].mlp
        assert isinstance(block, MoEFeedForward)
        dense = FeedForward(config, DENSE_SIZE).to(device)
        ways: dict[str, Way] = {"dense": dense, "ours": block}
        ways["loop over experts"] = functools.partial(loop_over_experts, block)
        ways["transformers, grouped"] = theirs.model.layers[0].mlp
        modules: list[nn.Module] = [block, dense, theirs]
        run = {"stage": 0, "seq_len": tokens, "run_dir": str(folder), "micro_batch_size": 1, "seed": SEED}
        for backend, title in BACKENDS.items():
            try:  # the layer that the backend puts in place of ours, with the same weights
                engine, _ = build_engine(config, env, device, precision="fp32", moe_backend=backend, **run)
            except UserError as error:  # such as a combination that this backend refuses
                print(f"{title}: not measured: {error}", file=sys.stderr)
                continue
            ways[title] = layer = engine.module.model.layers[0].mlp
            modules.append(layer)
        states = torch.randn(1, tokens, config.hidden_size, device=device)
        # In float32: a router that a backend keeps in float32 chooses otherwise than one in bfloat16 where it is close.
        with torch.no_grad():
            wanted = block(states)
            for name, compute in ways.items():
                if name != "dense" and (compute(states) - wanted).norm() > 1e-3 * wanted.norm():
                    raise SystemExit(f"{name} does not compute what the block does")
        for module in modules:
            module.to(dtype)
        states = states.to(dtype).requires_grad_()

        def step(way: Way) -> None:
            states.grad = None
            for module in modules:
                module.zero_grad()
            way(states).sum().backward()

        return time_rounds({name: functools.partial(step, way) for name, way in ways.items()}, rounds)


def loop_over_experts(block: MoEFeedForward, states: Tensor) -> Tensor:
    """The plain way: for each expert, gather its tokens, compute, add to the answer."""
    tokens = states.flatten(0, -2)
    weights, experts = route(block.gate(tokens), block.config)
    mixed = torch.zeros_like(tokens)
    # Taken apart at once: the gradient of `proj[number]` would be a zero tensor of all experts for each of them.
    matrices = zip(block.experts.gate_up_proj.unbind(), block.experts.down_proj.unbind(), strict=True)
    for number, (gate_up, down) in enumerate(matrices):
        rows, places = (experts == number).nonzero(as_tuple=True)
        gate, up = F.linear(tokens[rows], gate_up).chunk(2, dim=-1)
        outputs = F.linear(F.silu(gate) * up, down)
        mixed = mixed.index_add(0, rows, outputs * weights[rows, places, None].to(outputs.dtype))
    return mixed.view_as(states)


if __name__ == "__main__":
    tyro.cli(main)
