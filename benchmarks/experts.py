"""Forward and backward of a mixture-of-experts block beside a dense feed-forward of equal active operations.

    python benchmarks/experts.py [--tokens 4096] [--precision fp32 bf16]

All ways to run the same experts take turns in one process: ours (sorted tokens, grouped products), a plain loop over
experts, transformers' grouped path, and DeepSpeed's two backends as `minimind.parallel.experts` builds them. The
router is random and nearly balanced. A ratio is the dense block's seconds over the experts' in the same round.
"""

import functools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from engines import build
from measure import Claim, computes_in_bf16, environment, ratios, report
from torch import Tensor, nn

from minimind.distributed.cpu_tuning import keep_freed_memory
from minimind.distributed.environment import RankEnvironment, find_device, read_environment
from minimind.distributed.process_group import process_group
from minimind.errors import UserError
from minimind.model import MiniMindForCausalLM
from minimind.model.config import ModelConfig
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


def main(
    tokens: int = 4096,
    precision: tuple[str, ...] | None = None,
    rounds: int = 5,
    hidden_size: int = 768,
    output: Path | None = None,
) -> None:
    """Measure.

    Args:
        tokens: tokens in the batch.
        precision: fp32 and/or bf16 [default: both, where the device has products in bf16].
        rounds: turns of each.
        hidden_size: width of the residual stream.
        output: where the JSON goes.
    """
    where = environment()
    claims, measured = [], {}
    keep_freed_memory()  # as `minimind.train` does
    for name in precision or (("fp32", "bf16") if computes_in_bf16() else ("fp32",)):
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
        for num_experts, top_k, target in SHAPES:
            config = ModelConfig(
                hidden_size=hidden_size,
                use_moe=True,
                num_experts=num_experts,
                num_experts_per_tok=top_k,
                moe_intermediate_size=DENSE_SIZE // top_k,
                num_hidden_layers=1,
            )
            seconds = measure_shape(config, dtype, tokens, rounds)
            measured[f"{name}, {num_experts} experts, top {top_k}"] = seconds
            for way, values in seconds.items():
                if way != "dense":
                    title = f"experts, {name}, {num_experts} experts, top {top_k}: {way}"
                    goal = target if way == "ours" else None
                    claims.append(Claim(title, ratios(seconds["dense"], values), goal, unit="x of dense"))
    report(__file__, where, claims, measured, output)


def measure_shape(config: ModelConfig, dtype: torch.dtype, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of forward and backward of each way, round by round."""
    env = read_environment()
    device = find_device(env)
    with tempfile.TemporaryDirectory() as folder, process_group(env, device):
        with device:
            torch.manual_seed(SEED)
            block = MiniMindForCausalLM(config).model.layers[0].mlp
        assert isinstance(block, MoEFeedForward)
        dense = FeedForward(config, DENSE_SIZE).to(device)
        ways: dict[str, Way] = {
            "dense": dense,
            "ours": block,
            "loop over experts": functools.partial(loop_over_experts, block),
        }
        ways.update(transformers_way(block))
        modules: list[nn.Module] = [block, dense]
        for backend, title in BACKENDS.items():
            try:
                ways[title] = layer = build_backend(backend, config, env, device, tokens, folder)
            except UserError as error:  # such as a combination that this backend refuses
                print(f"{title}: not measured: {error}", file=sys.stderr)
                continue
            modules.append(layer)
        states = torch.randn(1, tokens, config.hidden_size, device=device)
        # In float32: a router that a backend keeps in float32 chooses otherwise than one in bfloat16 where it is close.
        check_equal(ways, states)
        for module in modules:
            module.to(dtype)
        return time_ways(ways, modules, states.to(dtype).requires_grad_(), rounds)


def build_backend(
    backend: str, config: ModelConfig, env: RankEnvironment, device: torch.device, tokens: int, folder: str
) -> nn.Module:
    """The layer that a backend of DeepSpeed puts in place of ours, with the same weights."""
    engine, _ = build(
        config,
        env,
        device,
        stage=0,
        seq_len=tokens,
        run_dir=folder,
        micro_batch_size=1,
        precision="fp32",
        seed=SEED,
        moe_backend=backend,
    )
    return engine.module.model.layers[0].mlp


def time_ways(ways: dict[str, Way], modules: list[nn.Module], states: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of forward and backward of each way, in turn; the first round only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            began = time.perf_counter()
            run(states).sum().backward()
            if states.is_cuda:
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - began)
            for module in modules:
                module.zero_grad()
            states.grad = None
    return seconds


def check_equal(ways: dict[str, Way], states: Tensor) -> None:
    """Every way computes what ours does."""
    with torch.no_grad():
        wanted = ways["ours"](states)
        for name, run in ways.items():
            if name != "dense" and (run(states) - wanted).norm() > 1e-3 * wanted.norm():
                raise SystemExit(f"{name} does not compute what the block does")


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


def transformers_way(block: MoEFeedForward) -> dict[str, Way]:
    """transformers' experts of Qwen3-MoE with our weights, by its grouped products; nothing where it has none."""
    try:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    except ImportError:
        return {}
    config = block.config
    theirs: Any = Qwen3MoeConfig(
        hidden_size=config.hidden_size,
        moe_intermediate_size=config.expert_feed_forward_size,
        num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
    )
    theirs._experts_implementation = "grouped_mm"
    experts: nn.Module = Qwen3MoeExperts(theirs)
    experts.gate_up_proj, experts.down_proj = block.experts.gate_up_proj, block.experts.down_proj

    def run(states: Tensor) -> Tensor:
        tokens = states.flatten(0, -2)
        weights, chosen = route(block.gate(tokens), config)
        return experts(tokens, chosen, weights.to(tokens.dtype)).view_as(states)

    return {"transformers, grouped": run}


if __name__ == "__main__":
    tyro.cli(main)
