"""Tiny runs of models with experts, on one rank or on several, and the plain loop that they are compared with."""

from typing import Any

import deepspeed
import engine_runs
import torch
from engine_runs import CPU, MODEL, SEQ_LEN, SETTINGS, plain_optimizer
from torch import nn

from minimind.config.resolved_run import ResolvedRun
from minimind.distributed.environment import read_environment
from minimind.distributed.process_group import process_group
from minimind.errors import UserError
from minimind.model import MiniMindForCausalLM, ModelConfig
from minimind.parallel.engine import build_engine, build_model
from minimind.parallel.optimizer import optimizer_step

DENSE = MODEL.to_dict()
# tiny-moe, smaller: a dense layer below two with experts, and a router loss that can be seen in the gradient norm. Its
# weights start large: where a token has two best experts but for rounding, another order of sums takes the other one.
EXPERTS = {
    **DENSE, "num_hidden_layers": 3, "first_k_dense_replace": 1, "use_moe": True, "num_experts": 8,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32, "router_aux_loss_coef": 0.1,
    "initializer_range": 0.1,
}  # fmt: skip
ROWS, PARTS = 4, 2  # a step has PARTS micro-batches, on one rank or on two
NUM_TARGETS = ROWS * SEQ_LEN

Curve = tuple[list[float], list[float]]
"""Losses and gradient norms (before clipping) of the steps."""


def make_steps(count: int) -> list[tuple[torch.Tensor, ...]]:
    """The micro-batches of each step: PARTS tensors (ROWS / PARTS, SEQ_LEN + 1)."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, DENSE["vocab_size"], (count, ROWS, SEQ_LEN + 1), generator=generator)
    return [step.split(ROWS // PARTS) for step in tokens]


MUON_LR = 0.02
OTHER_LR = {"embedding_lr": 0.03, "norm_lr": 0.002}
"""Of an untied embedding and of norms, beside Muon."""


class PlainMuon(torch.optim.SGD):
    """Muon for whole matrices (..., rows, columns), a line for each of its formulas."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for matrix in group["params"]:
                momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                momentum.copy_(0.95 * momentum + 0.05 * matrix.grad)
                update = 0.95 * momentum + 0.05 * matrix.grad
                matrix.mul_(1 - group["lr"] * SETTINGS["weight_decay"])
                # The model keeps the gates of its experts in one tensor with what they let through.
                parts = 2 if matrix.dim() == 3 and matrix.shape[1] > matrix.shape[2] else 1
                for weight, x in zip(matrix.chunk(parts, dim=-2), update.chunk(parts, dim=-2), strict=True):
                    rows, columns = x.shape[-2:]
                    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
                    for _ in range(5):
                        x = 3.4445 * x - 4.7750 * (x @ x.mT) @ x + 2.0315 * (x @ x.mT) @ (x @ x.mT) @ x
                    weight.sub_(group["lr"] * max(1, rows / columns) ** 0.5 * x)


def train_plainly(model: dict[str, Any], count: int, *, collapsed: bool = False, muon: bool = False) -> Curve:
    """AdamW (or Muon beside it) in torch on the model as it is; nothing of this project but the model."""
    torch.manual_seed(SETTINGS["seed"])
    module = MiniMindForCausalLM(ModelConfig(**model))
    if collapsed:
        collapse_routers(module)
    untied = muon and model.get("tie_word_embeddings") is False
    for_adamw = ("lm_head", "mlp.gate.", *(() if untied else ("embed_tokens",))) if muon else ("",)
    others = {name for name, _ in module.named_parameters() if any(part in name for part in for_adamw)}
    optimizers: list[torch.optim.Optimizer] = [plain_optimizer(module, others)]
    if untied:
        optimizers[0].param_groups[1]["lr"] = OTHER_LR["norm_lr"]
        own_rate = {"lr": OTHER_LR["embedding_lr"], "weight_decay": SETTINGS["weight_decay"]}
        optimizers[0].add_param_group({"params": [module.model.embed_tokens.weight], **own_rate})
        others.add("model.embed_tokens.weight")
    if muon:
        own = [p for name, p in module.named_parameters() if p.dim() > 1 and name not in others]
        optimizers.append(PlainMuon(own, MUON_LR))
    losses, norms = [], []
    for step in make_steps(count):
        module.zero_grad()
        loss = 0.0
        for tokens in step:
            output = module(tokens[:, :-1], tokens[:, 1:], loss_reduction="sum")
            total = output.loss / NUM_TARGETS
            loss += total.item()
            if output.aux_loss is not None:
                total = total + output.aux_loss / PARTS
            total.backward()
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), SETTINGS["max_grad_norm"])))
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss)
    return losses, norms


def resolve(
    stage: int, world_size: int, model: dict[str, Any], ds: dict[str, Any] | None = None, **train: Any
) -> ResolvedRun:
    """A run of PARTS micro-batches a step, over ranks or accumulated."""
    shares = {"micro_batch_size": ROWS // PARTS, "gradient_accumulation_steps": PARTS // world_size, **train}
    return engine_runs.resolve(stage, ds=ds, model=ModelConfig(**model), world_size=world_size, **shares)


def take_step(engine: Any, resolved: ResolvedRun, step: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    """One optimizer step on this rank's micro-batches; loss and norm, both of all ranks."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own = step if world_size == 1 else step[rank : rank + 1]
    loss = torch.zeros(())
    for tokens in own:
        output = engine(tokens[:, :-1], tokens[:, 1:], loss_reduction="sum")
        loss += output.loss.detach() / NUM_TARGETS
        total = output.loss * (PARTS / NUM_TARGETS)
        engine.backward(total if output.aux_loss is None else total + output.aux_loss)
        if tokens is not own[-1]:
            engine.step()
    norm = float(optimizer_step(engine, resolved))
    torch.distributed.all_reduce(loss)
    return float(loss), norm


def gathered_weights(engine: Any) -> list[torch.Tensor]:
    """What this rank's weights are now: its own experts, and everything that all ranks share."""
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return [parameter.detach().clone() for parameter in engine.module.parameters()]


def spoil(stage: int, model: dict[str, Any], train: dict[str, Any]) -> tuple[float, bool, float, float]:
    """A step with a NaN in the last rank's loss alone, between two good ones: its norm, whether it left this rank's
    weights alone, and the losses of the first and the last step."""
    env = read_environment()
    torch.set_num_threads(1)
    with process_group(env, CPU):
        resolved = resolve(stage, env.world_size, model, **train)
        engine = build_engine(resolved, build_model(resolved, CPU))
        steps = make_steps(2)
        first, _ = take_step(engine, resolved, steps[0])
        before = gathered_weights(engine)
        output = engine(steps[1][env.rank][:, :-1], steps[1][env.rank][:, 1:])
        engine.backward(output.loss * (float("nan") if env.rank == env.world_size - 1 else 1.0))
        norm = float(optimizer_step(engine, resolved))
        same = all(torch.equal(*pair) for pair in zip(before, gathered_weights(engine), strict=True))
        last, _ = take_step(engine, resolved, steps[1])
        engine.destroy()
    return norm, same, first, last


@torch.no_grad()
def collapse_routers(model: MiniMindForCausalLM, strength: float = 3.0) -> None:
    """Let every router send every token to the first experts: all tokens share a large feature that these ask for."""
    gates = [layer.mlp.gate.weight for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    targets = [model.model.embed_tokens.weight, *gates]
    with deepspeed.zero.GatheredParameters(targets, modifier_rank=0):
        targets[0][:, 0] = strength
        for gate in gates:
            gate[:, 0] = torch.arange(len(gate), 0, -1.0) / len(gate)


def walk(
    cells: list[tuple[int, dict[str, Any], dict[str, Any]]], count: int, collapsed: bool = False
) -> list[Curve | str]:
    """Train each cell (stage, model, settings) in one process group; its curve, or why it was refused."""
    env = read_environment()
    torch.set_num_threads(1)
    found: list[Curve | str] = []
    with process_group(env, CPU):
        for stage, model, train in cells:
            try:
                resolved = resolve(stage, env.world_size, model, **train)
            except UserError as error:
                found.append(str(error))
                continue
            module = build_model(resolved, CPU)
            if collapsed:
                collapse_routers(module)
            engine = build_engine(resolved, module)
            curve = [take_step(engine, resolved, step) for step in make_steps(count)]
            engine.destroy()
            found.append(([loss for loss, _ in curve], [norm for _, norm in curve]))
    return found
