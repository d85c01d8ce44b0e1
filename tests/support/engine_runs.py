"""A small engine beside a plain torch loop: one settled shape and one set of settings for both."""

import math
from collections.abc import Container
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

from minimind.config.resolve import resolve_run
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import DataConfig, RunConfig, TrainConfig
from minimind.model import MiniMindForCausalLM, ModelConfig
from minimind.parallel.engine import build_engine, build_model
from minimind.parallel.optimizer import optimizer_step

CPU = torch.device("cpu")
MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64,
)  # fmt: skip
LR, CLIP = 1e-2, 1.0
# An eps so large that rounding in a gradient near zero is not blown up to a whole step.
SETTINGS = {"lr": LR, "max_grad_norm": CLIP, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-4, "seed": 3}
SEQ_LEN = 16
Step = list[tuple[torch.Tensor, torch.Tensor]]  # micro-batches of (input_ids, labels), each (B, T)


def resolve(
    stage: int, *, ds: dict[str, Any] | None = None, model: ModelConfig = MODEL, world_size: int = 1, **train: Any
) -> ResolvedRun:
    # Buckets smaller than the model, so that it takes several.
    section: dict[str, Any] = {
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 5000, "allgather_bucket_size": 5000}
    }
    if stage:
        section["data_types"] = {"grad_accum_dtype": "fp32"}
    settings = {**SETTINGS, "optimizer": None if "optimizer" in (ds or {}) else "adamw", "micro_batch_size": 4, **train}
    run = RunConfig(model=model, data=DataConfig(seq_len=SEQ_LEN), train=TrainConfig(**settings))
    return resolve_run(run, {**section, **(ds or {})}, world_size=world_size)


def make_steps(count: int, micro_batches: int = 1, size: int = 4, seed: int = 0) -> list[Step]:
    """Batches whose micro-batches differ in their number of targets, as with a document mask."""
    generator = torch.Generator().manual_seed(seed)
    steps = []
    for _ in range(count):
        tokens = torch.randint(3, MODEL.vocab_size, (micro_batches, size, 17), generator=generator)
        labels = tokens[..., 1:].clone()
        for micro in range(micro_batches):
            labels[micro, :, : 3 * micro + 1] = -100
        steps.append(list(zip(tokens[..., :-1], labels, strict=True)))
    return steps


def count_targets(step: Step) -> int:
    return int(sum((labels != -100).sum() for _, labels in step))


def take_step(engine: deepspeed.DeepSpeedEngine, resolved: ResolvedRun, step: Step, spoil: float = 1.0):
    """One optimizer step; the loss before it and the gradient norm."""
    targets, loss = count_targets(step), 0.0
    for i, (input_ids, labels) in enumerate(step):
        summed = engine(input_ids, labels, loss_reduction="sum").loss
        loss += summed.item() / targets
        engine.backward(summed * (len(step) / targets) * spoil)
        if i < len(step) - 1:
            engine.step()
    return loss, float(optimizer_step(engine, resolved))


def weights(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Float32 weights, gathered."""
    if not engine.zero_optimization():
        return {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}
    return {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in engine.module.named_parameters()}


def train(resolved: ResolvedRun, steps: list[Step], spoil_at: int | None = None):
    """Losses, gradient norms and final weights; the step `spoil_at` is taken once more before, with NaN gradients."""
    engine = build_engine(resolved, build_model(resolved, CPU))
    losses, norms = [], []
    for i, step in enumerate(steps):
        if i == spoil_at:
            before = weights(engine)
            _, norm = take_step(engine, resolved, step, spoil=float("nan"))
            assert not math.isfinite(norm)
            assert_equal(before, weights(engine))
        loss, norm = take_step(engine, resolved, step)
        losses.append(loss)
        norms.append(norm)
    found = weights(engine)
    engine.destroy()
    return losses, norms, found


def plain_optimizer(module: nn.Module, matrices: Container[str] | None = None) -> torch.optim.AdamW:
    """torch's AdamW by SETTINGS: `matrices` (by name; None: all) decay, vectors do not."""
    chosen = [p for name, p in module.named_parameters() if p.dim() > 1 and (matrices is None or name in matrices)]
    groups = [
        {"params": chosen, "weight_decay": SETTINGS["weight_decay"]},
        {"params": [p for p in module.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LR, betas=SETTINGS["betas"], eps=SETTINGS["eps"], foreach=False)


def train_plainly(steps: list[Step], clip: float = CLIP, model: ModelConfig = MODEL):
    """The same in a few lines of torch, without anything of this project but the model."""
    torch.manual_seed(SETTINGS["seed"])
    module = MiniMindForCausalLM(model)
    optimizer = plain_optimizer(module)
    losses, norms = [], []
    for step in steps:
        optimizer.zero_grad()
        logits = torch.cat([module(input_ids).logits.flatten(0, 1) for input_ids, _ in step])
        labels = torch.cat([labels.flatten() for _, labels in step])
        loss = nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), clip or math.inf)))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def assert_close(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], tolerance: float = 1e-4) -> None:
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=tolerance, atol=tolerance * LR, msg=name)
