"""Forward and backward of a mixture-of-experts block beside a dense feed-forward of equal active operations.

python benchmarks/experts.py [--tokens 4096] [--precision fp32 bf16]
"""

import copy
import functools
import sys

import torch
import tyro
from harness import Claim, has_fast_bf16, joined, ratios, report, resolve, time_rounds, workspace
from harness import transformers_model as build_theirs
from torch import nn

from minimind.errors import UserError
from minimind.model import MiniMindForCausalLM
from minimind.model.config import ModelConfig
from minimind.model.kernels.apply import apply_kernels
from minimind.model.layers import FeedForward
from minimind.reports.plan import trial

# (experts, experts a token, share of the dense block's speed to reach): the experts of a token are as wide together as
# the dense block.
SHAPES = ((4, 1, 0.85), (16, 2, 0.8), (64, 4, 0.6))
DENSE_SIZE = 2432
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
            theirs = build_theirs(model, experts_implementation="grouped_mm")
        plain = copy.deepcopy(model)
        apply_kernels(model, device)
        block, dense = model.model.layers[0].mlp, FeedForward(config, DENSE_SIZE).to(device)
        ways: dict[str, nn.Module] = {"dense": dense, "ours": block, "loop over experts": plain.model.layers[0].mlp}
        ways["transformers, grouped"] = theirs.model.layers[0].mlp
        run = {"stage": 0, "seq_len": tokens, "precision": "fp32", "micro_batch_size": 1, "seed": SEED}
        for backend, title in BACKENDS.items():
            try:  # the layer that the backend puts in place of ours, with the same weights
                resolved = resolve(config, env, device, moe_backend=backend, **run)
                engine = trial.make_trainer(resolved, env, device, folder / backend).engine
            except UserError as error:  # such as a combination that this backend refuses
                print(f"{title}: not measured: {error}", file=sys.stderr)
                continue
            ways[title] = engine.module.model.layers[0].mlp
        states = torch.randn(1, tokens, config.hidden_size, device=device)
        # In float32: a router that a backend keeps in float32 chooses otherwise than one in bfloat16 where it is close.
        with torch.no_grad():
            wanted = block(states)
            for name, compute in ways.items():
                if name != "dense" and (compute(states) - wanted).norm() > 1e-3 * wanted.norm():
                    raise SystemExit(f"{name} does not compute what the block does")
        for way in ways.values():
            way.to(dtype)
        states = states.to(dtype).requires_grad_()

        def step(way: nn.Module) -> None:
            states.grad = None
            way.zero_grad()
            way(states).sum().backward()

        return time_rounds({name: functools.partial(step, way) for name, way in ways.items()}, rounds)


if __name__ == "__main__":
    tyro.cli(main)
