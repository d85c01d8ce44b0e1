"""What DeepSpeed costs: the same model and batches in a bare loop and under ZeRO 0 to 3, one rank, taking turns.

    python benchmarks/deepspeed_overhead.py [--precision fp32] [--micro-batches 8]

The bare loop is torch alone: forward, backward, clipping, fused AdamW; in bf16 with float32 master weights and
gradients, as ZeRO keeps them. All of them have what `minimind.train` gives a process on a CPU
(`minimind.distributed.cpu_tuning`).
A ratio is the bare loop's turn over the stage's in the same round.
"""

import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import torch
import tyro
from engines import build
from measure import ROOT, Claim, core_threads, environment, ratios, report
from turns import Contestant, started, take_turns

from minimind import openmp_environment
from minimind.config.run_config import preset
from minimind.distributed.cpu_tuning import keep_freed_memory
from minimind.distributed.environment import find_device, read_environment
from minimind.distributed.process_group import process_group
from minimind.model import MiniMindForCausalLM
from minimind.parallel.optimizer import optimizer_step, parameter_groups

TARGETS = {0: None, 1: 0.95, 2: 0.95, 3: 0.85}
PATTERN = r"^step (?P<step>\d+)"


def main(
    precision: Literal["fp32", "bf16"] = "fp32",
    model: str = "minimind3",
    micro_batches: int = 8,
    batch: int = 2,
    seq_len: int = 340,
    rounds: int = 5,
    minutes: float = math.inf,
    steps: int = 1,
    stages: tuple[int, ...] = (0, 1, 2, 3),
    only: str | None = None,
    output: Path | None = None,
) -> None:
    """Measure, or with `only` be one of the contestants.

    Args:
        precision: of forward and backward.
        model: preset.
        micro_batches: forward and backward passes in an optimizer step.
        batch: sequences in a micro-batch.
        seq_len: their length.
        rounds: turns of each, at most.
        minutes: time for all of it: fewer rounds are made on a slow machine.
        steps: optimizer steps in a turn.
        stages: ZeRO stages to measure.
        only: "bare" or a stage: train without end and print each step.
        output: where the JSON goes.
    """
    if only is not None:
        train(only, precision, model, micro_batches, batch, seq_len)
        return
    where, deadline = environment(), time.perf_counter() + 60 * minutes
    names = {"bare": "bare", **{f"ZeRO {stage}": str(stage) for stage in stages}}
    shape = [f"--precision={precision}", f"--model={model}", f"--batch={batch}", f"--seq-len={seq_len}"]
    contestants = [
        Contestant(
            name,
            [sys.executable, __file__, f"--only={kind}", f"--micro-batches={micro_batches}", *shape],
            PATTERN,
            steps,
            env={**core_threads(), **openmp_environment(os.environ)},
        )
        for name, kind in names.items()
    ]
    with started(contestants):
        take_turns(contestants, rounds, deadline)
    bare = [turn.wall_seconds for turn in contestants[0].turns]
    claims = [Claim(f"{precision}, {micro_batches} micro-batches: bare loop", tuple(bare), unit="s a turn")]
    for stage, contestant in zip(stages, contestants[1:], strict=True):
        shares = ratios(bare, [turn.wall_seconds for turn in contestant.turns])
        claims.append(Claim(f"{precision}, ZeRO {stage} beside the bare loop", shares, TARGETS[stage], unit="x"))
    seconds = {
        contestant.name: {
            "wall": [turn.wall_seconds / turn.steps for turn in contestant.turns],
            "cpu": [turn.cpu_seconds / turn.steps for turn in contestant.turns],
        }
        for contestant in contestants
    }
    shape_of_run = {"model": model, "micro_batches": micro_batches, "batch": batch, "seq_len": seq_len}
    path = output or ROOT / "benchmarks" / "out" / f"deepspeed_overhead_{precision}.json"
    report(__file__, where, claims, {"run": shape_of_run, "seconds_a_step": seconds}, path)


def train(kind: str, precision: str, model: str, micro_batches: int, batch: int, seq_len: int) -> None:
    """Steps without end, on fixed random tokens."""
    if not torch.cuda.is_available():
        keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(3, preset(model).vocab_size, (micro_batches, batch, seq_len), generator=generator)
    if kind == "bare":
        train_bare(batches, precision, model)
    else:
        train_engine(batches, precision, model, int(kind))


def train_bare(batches: torch.Tensor, precision: str, model: str) -> None:
    """Torch alone."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = batches.to(device)
    torch.manual_seed(42)
    network = MiniMindForCausalLM(preset(model)).to(device)
    masters = list(network.parameters())
    if precision == "bf16":
        masters = [parameter.detach().clone().requires_grad_() for parameter in masters]
        network = network.bfloat16()
    twins = list(zip(network.parameters(), masters, strict=True))
    by_id = {id(parameter): master for parameter, master in twins}
    groups = [{**group, "params": [by_id[id(p)] for p in group["params"]]} for group in parameter_groups(network, 0.1)]
    optimizer = torch.optim.AdamW(groups, lr=5e-4, betas=(0.9, 0.95), fused=True)
    step = 0
    while True:
        for tokens in batches:
            network(tokens, tokens).loss.div(len(batches)).backward()
            if precision == "bf16":
                for parameter, master in twins:
                    gradient = parameter.grad
                    master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)
                    parameter.grad = None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if precision == "bf16":
            with torch.no_grad():
                torch._foreach_copy_([parameter for parameter, _ in twins], masters)
        step = note(step, device)


def train_engine(batches: torch.Tensor, precision: str, model: str, stage: int) -> None:
    """The engine that `minimind.train` builds, with our ds_configs."""
    env = read_environment()
    device = find_device(env)
    with tempfile.TemporaryDirectory() as folder, process_group(env, device):
        engine, resolved = build(
            preset(model),
            env,
            device,
            stage=stage,
            seq_len=batches.shape[2],
            run_dir=folder,
            micro_batch_size=batches.shape[1],
            gradient_accumulation_steps=len(batches),
            precision=precision,
        )
        batches = batches.to(device)
        step = 0
        while True:
            for number, tokens in enumerate(batches):
                engine.backward(engine(tokens, tokens).loss)
                if number + 1 < len(batches):
                    engine.step()
            optimizer_step(engine, resolved)
            step = note(step, device)


def note(step: int, device: torch.device) -> int:
    """Print that a step is done, when it is."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"step {step + 1}", flush=True)
    return step + 1


if __name__ == "__main__":
    tyro.cli(main)
