"""What DeepSpeed costs: the same model and batches in a bare loop and under ZeRO 0 to 3, one rank, taking turns.

python benchmarks/deepspeed_overhead.py [--precision fp32] [--micro-batches 8]
"""

import itertools
import math
import os
import sys
from collections.abc import Callable
from typing import Literal

import torch
import tyro
from harness import OUT, Claim, core_threads, joined, ratios, report, resolve, workspace
from turns import Contestant, started, take_turns

from minimind import openmp_environment
from minimind.accelerator import accelerator_type, synchronize
from minimind.config.run_config import preset
from minimind.model import MiniMindForCausalLM
from minimind.model.kernels.apply import apply_kernels
from minimind.parallel.optimizer import optimizer_step, parameter_groups
from minimind.reports.plan import trial

CPU_TARGETS, TARGETS = {1: 0.95, 2: 0.95, 3: 0.85}, {1: 0.97, 2: 0.95, 3: 0.9}


def main(
    precision: Literal["fp32", "bf16"] = "fp32", model: str = "minimind3", micro_batches: int = 8,
    batch: int = 2, seq_len: int = 340, rounds: int = 5, minutes: float = math.inf, steps: int = 1,
    stages: tuple[int, ...] = (0, 1, 2, 3), compile: bool = False, only: str | None = None,
) -> None:  # fmt: skip
    """Measure, or with `only` be one of the contestants.

    Args:
        micro_batches: forward and backward passes in an optimizer step.
        batch: sequences in a micro-batch.
        only: "bare" or a stage: train without end and print each step.
    """
    if only is not None:
        train(only, precision, model, (micro_batches, batch, seq_len), compile)
    shape = [f"--precision={precision}", f"--model={model}", f"--micro-batches={micro_batches}"]
    shape += [f"--batch={batch}", f"--seq-len={seq_len}", *["--compile"] * compile]
    env = {**core_threads(), **openmp_environment(os.environ)}
    contestants = [
        Contestant(name, [sys.executable, __file__, *shape, f"--only={kind}"], r"^step \d+", steps, env=env)
        for name, kind in (("bare", "bare"), *((f"ZeRO {stage}", str(stage)) for stage in stages))
    ]
    with started(contestants) as began:
        take_turns(contestants, rounds, began + 60 * minutes)
    bare = contestants[0].seconds
    claims = [Claim(f"{precision}, {micro_batches} micro-batches: bare loop", bare, unit="s a step")]
    for stage, contestant in zip(stages, contestants[1:], strict=True):
        name = f"{precision}, ZeRO {stage} beside the bare loop"
        target = (TARGETS if accelerator_type() else CPU_TARGETS).get(stage)
        claims.append(Claim(name, ratios(bare, contestant.seconds), target, unit="x"))
    seconds = {contestant.name: contestant.seconds for contestant in contestants}
    report(__file__, claims, {"run": shape, "seconds_a_step": seconds}, OUT / f"deepspeed_overhead_{precision}.json")


def train(kind: str, precision: str, model: str, shape: tuple[int, int, int], compile: bool) -> None:
    """Steps without end, on fixed random tokens of `shape` (micro-batches, sequences, tokens)."""
    batches = torch.randint(3, preset(model).vocab_size, shape, generator=torch.Generator().manual_seed(0))
    with workspace() as folder, joined() as (env, device):
        batches = batches.to(device)
        if kind == "bare":
            make_step = bare_step(batches, precision, model, compile)
        else:
            run = {"gradient_accumulation_steps": shape[0], "micro_batch_size": shape[1], "seq_len": shape[2]}
            run |= {"stage": int(kind), "precision": precision, "compile": "on" if compile else "off"}
            resolved = resolve(preset(model), env, device, **run)
            engine = trial.make_trainer(resolved, env, device, folder).engine

            def make_step() -> None:
                """As `minimind.train` does."""
                for number, tokens in enumerate(batches):
                    engine.backward(engine(tokens, tokens).loss)
                    if number + 1 < len(batches):
                        engine.step()
                optimizer_step(engine, resolved)

        for step in itertools.count(1):
            make_step()
            synchronize(device)
            print(f"step {step}", flush=True)


def bare_step(batches: torch.Tensor, precision: str, model: str, compile: bool) -> Callable[[], None]:
    """Torch alone."""
    torch.manual_seed(42)
    network = MiniMindForCausalLM(preset(model)).to(batches.device)
    apply_kernels(network, batches.device)
    masters = list(network.parameters())
    if precision == "bf16":
        masters = [parameter.detach().clone().requires_grad_() for parameter in masters]
        network = network.bfloat16()
    if compile:
        network.compile()
    twins = list(zip(network.parameters(), masters, strict=True))
    by_id = {id(parameter): master for parameter, master in twins}
    groups = [{**group, "params": [by_id[id(p)] for p in group["params"]]} for group in parameter_groups(network, 0.1)]
    optimizer = torch.optim.AdamW(groups, lr=5e-4, betas=(0.9, 0.95), fused=True)

    def step() -> None:
        for tokens in batches:
            network(tokens, tokens).loss.div(len(batches)).backward()
            for parameter, master in twins if precision == "bf16" else ():
                gradient = parameter.grad
                master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if precision == "bf16":
            with torch.no_grad():
                torch._foreach_copy_([parameter for parameter, _ in twins], masters)

    return step


if __name__ == "__main__":
    tyro.cli(main)
