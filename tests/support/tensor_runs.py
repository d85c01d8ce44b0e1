"""Tiny runs whose layers are split over ranks, and the plain loop that they are compared with."""

from collections.abc import Sequence
from typing import Any

import deepspeed
import engine_runs
import torch
from engine_runs import CPU, MODEL, SEQ_LEN, SETTINGS, plain_optimizer
from torch import Tensor, nn

from minimind.config.resolved_run import ResolvedRun
from minimind.data.dataset import SequencePart
from minimind.distributed.environment import read_environment
from minimind.distributed.process_group import process_group
from minimind.model import MiniMindForCausalLM, ModelConfig
from minimind.parallel.engine import build_engine, build_model
from minimind.parallel.mesh import Mesh, make_mesh
from minimind.parallel.optimizer import optimizer_step

# Weights that start large, so that a gradient which is wrong is seen in the losses.
DENSE = {**MODEL.to_dict(), "initializer_range": 0.1}
ROWS, PARTS = 4, 2  # a step has PARTS micro-batches, on one data-parallel rank or on two
Step = list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]
"""Micro-batches: input_ids, labels, position_ids (each (B, T)), borders of the documents."""
Curve = tuple[list[float], list[float]]
"""Losses and gradient norms (before clipping) of the steps."""


def make_steps(count: int, documents: bool = False) -> list[Step]:
    generator = torch.Generator().manual_seed(0)
    rows, steps = ROWS // PARTS, []
    for _ in range(count):
        step: Step = []
        for part in range(PARTS):
            tokens = torch.randint(3, DENSE["vocab_size"], (rows, SEQ_LEN + 1), generator=generator)
            labels, positions, borders = tokens[:, 1:].clone(), None, None
            labels[:, : 2 * part + 1] = -100
            if documents:
                inner = [row * SEQ_LEN + cut for row in range(rows) for cut in (0, 3 + row + part, 11 - part)]
                borders = torch.tensor([*inner, rows * SEQ_LEN], dtype=torch.int32)
                firsts = borders[:-1].long().repeat_interleave(borders.diff().long())
                positions = (torch.arange(rows * SEQ_LEN) - firsts).view(rows, SEQ_LEN)
            step.append((tokens[:, :-1].contiguous(), labels, positions, borders))
        steps.append(step)
    return steps


def count_targets(step: Step) -> int:
    return sum(int((labels != -100).sum()) for _, labels, *_ in step)


def train_plainly(model: dict[str, Any], steps: Sequence[Step]) -> Curve:
    """AdamW in torch on the model as it is, in one process; nothing of this project but the model."""
    torch.manual_seed(SETTINGS["seed"])
    module = MiniMindForCausalLM(ModelConfig(**model))
    optimizer = plain_optimizer(module)
    losses, norms = [], []
    for step in steps:
        optimizer.zero_grad()
        loss = torch.zeros(())
        for ids, labels, positions, borders in step:
            output = module(ids, labels, position_ids=positions, cu_seqlens=borders, loss_reduction="sum")
            total = output.loss / count_targets(step)
            (total if output.aux_loss is None else total + output.aux_loss / PARTS).backward()
            loss += output.loss.detach() / count_targets(step)
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), SETTINGS["max_grad_norm"])))
        optimizer.step()
        losses.append(float(loss))
    return losses, norms


def resolve(stage: int, tp_size: int, model: dict[str, Any], world_size: int, **others: Any) -> ResolvedRun:
    dp_size = world_size // (tp_size * others.get("sp_size", 1))
    shares = {"micro_batch_size": ROWS // PARTS, "gradient_accumulation_steps": PARTS // dp_size, "tp_size": tp_size}
    return engine_runs.resolve(stage, model=ModelConfig(**model), world_size=world_size, **{**shares, **others})


def take_step(engine: deepspeed.DeepSpeedEngine, resolved: ResolvedRun, mesh: Mesh, step: Step) -> tuple[float, float]:
    """One optimizer step on this rank's micro-batches, of whose rows it has a part; loss and norm, both of all ranks."""
    own, loss = step if mesh.dp_size == 1 else step[mesh.dp_rank :][:1], torch.zeros(())
    columns = SequencePart(mesh.sp_rank, mesh.sp_size).columns(SEQ_LEN)
    for number, (ids, labels, positions, borders) in enumerate(own):
        positions = torch.arange(SEQ_LEN).expand_as(ids) if positions is None else positions
        ids, labels, positions = (x[:, columns].contiguous() for x in (ids, labels, positions))
        output = engine(ids, labels, position_ids=positions, cu_seqlens=borders, loss_reduction="sum")
        loss += output.loss.detach() / count_targets(step)
        total = output.loss * (len(own) * mesh.num_averaging / count_targets(step))
        engine.backward(total if output.aux_loss is None else total + output.aux_loss)
        if number < len(own) - 1:
            engine.step()
    norm = float(optimizer_step(engine, resolved))
    torch.distributed.all_reduce(loss, group=mesh.averaging)
    return float(loss), norm


def walk(cells: Sequence[dict[str, Any]], count: int) -> list[Curve]:
    """Train each cell (settings of `resolve`, and whether there are `documents`) in one process group."""
    env = read_environment()
    torch.set_num_threads(1)
    found: list[Curve] = []
    with process_group(env, CPU):
        for cell in cells:
            settings = {name: value for name, value in cell.items() if name != "documents"}
            resolved = resolve(world_size=env.world_size, **settings)
            mesh = make_mesh(resolved)
            engine = build_engine(resolved, build_model(resolved, CPU, mesh), mesh)
            curve = [take_step(engine, resolved, mesh, step) for step in make_steps(count, cell.get("documents", False))]
            engine.destroy()
            found.append(([loss for loss, _ in curve], [norm for _, norm in curve]))
    return found
