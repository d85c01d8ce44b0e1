"""Every ZeRO stage on one rank against a plain torch loop; what a NaN gradient does; who decays.

The steps are taken as the trainer takes them: the summed loss, scaled to the targets of the whole step.
"""

import math
from collections.abc import Iterator
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.utils import get_z3_leaf_modules, safe_get_full_fp32_param
from torch import nn

from minimind.config.deepspeed_file import load_ds_config
from minimind.config.deepspeed_table import TABLE, Row
from minimind.config.resolve import resolve_run
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import DataConfig, RunConfig, TrainConfig
from minimind.distributed.environment import RankEnvironment
from minimind.distributed.process_group import process_group
from minimind.errors import UserError
from minimind.model import MiniMindForCausalLM, ModelConfig
from minimind.model.transformer import Block
from minimind.parallel import deepspeed_check
from minimind.parallel.engine import build_engine, build_model, gathers_by_block
from minimind.parallel.loss_scale import loss_scale
from minimind.parallel.optimizer import clip_gradients, optimizer_step, parameter_groups, set_learning_rate

CPU = torch.device("cpu")
MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64,
)  # fmt: skip
LR, CLIP, DECAY, BETAS = 1e-2, 1.0, 0.1, (0.9, 0.95)
EPS = 1e-4  # so large that rounding in a gradient near zero is not blown up to a whole step
Step = list[tuple[torch.Tensor, torch.Tensor]]  # micro-batches of (input_ids, labels), each (B, T)


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.setenv(name, "0")
            patch.delenv(name)
        with process_group(RankEnvironment(), CPU):
            yield


def resolve(stage: int, *, ds: dict[str, Any] | None = None, model: ModelConfig = MODEL, **train: Any) -> ResolvedRun:
    settings = {"lr": LR, "max_grad_norm": CLIP, "weight_decay": DECAY, "betas": BETAS, "eps": EPS, "seed": 3, **train}
    settings.setdefault("micro_batch_size", 4)
    # Buckets smaller than the model, so that it takes several.
    section: dict[str, Any] = {
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 5000, "allgather_bucket_size": 5000}
    }
    if stage:
        section["data_types"] = {"grad_accum_dtype": "fp32"}
    run = RunConfig(model=model, data=DataConfig(seq_len=16), train=TrainConfig(**settings))
    return resolve_run(run, {**section, **(ds or {})}, dp_size=1)


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


def train_plainly(steps: list[Step], clip: float = CLIP, model: ModelConfig = MODEL):
    """The same in a few lines of torch, without anything of this project but the model."""
    torch.manual_seed(3)
    module = MiniMindForCausalLM(model)
    matrices = [parameter for parameter in module.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in module.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=LR, betas=BETAS, eps=EPS, foreach=False,
    )  # fmt: skip
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


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("clips", [True, False])
def test_every_stage_is_the_plain_loop(stage, micro_batches, clips):
    clip = {1: 1.2, 3: 0.76}[micro_batches] if clips else 0.0  # among the norms of these steps
    steps = make_steps(5, micro_batches)
    resolved = resolve(stage, gradient_accumulation_steps=micro_batches, max_grad_norm=clip)
    losses, norms, found = train(resolved, steps)
    plain_losses, plain_norms, plain = train_plainly(steps, clip)
    assert losses == pytest.approx(plain_losses, rel=1e-5)
    assert norms == pytest.approx(plain_norms, rel=1e-4)
    assert not clips or max(norms) > clip > min(norms), "the clip is not tested"
    assert_close(found, plain)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_shipped_files_are_the_plain_loop(stage):
    """With what "auto" becomes on one CPU rank, and with a NaN step that must leave no trace."""
    steps = make_steps(5, micro_batches=3)
    shipped = load_ds_config(f"ds_configs/zero{stage}.json")["zero_optimization"]
    resolved = resolve(stage, gradient_accumulation_steps=3, ds={"zero_optimization": shipped})
    zero = resolved.ds["zero_optimization"]
    assert stage == 1 or (zero["reduce_scatter"], zero["overlap_comm"]) == (False, False)
    losses, norms, found = train(resolved, steps)
    plain_losses, plain_norms, plain = train_plainly(steps)
    assert losses == pytest.approx(plain_losses, rel=1e-5)
    assert norms == pytest.approx(plain_norms, rel=1e-4)
    assert_close(found, plain)
    assert_equal(train(resolved, steps, spoil_at=2)[2], found)


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ({}, 2),
        ({"stage3_module_granularity_threshold": 1}, 0),
        ({"leaf_module": {"classes": ["minimind.model.attention.Attention"]}}, 0),
    ],
)
def test_zero_3_gathers_block_by_block_unless_the_json_says_otherwise(zero, expected):
    resolved = resolve(3, ds={"zero_optimization": {"stage": 3, **zero}})
    engine = build_engine(resolved, build_model(resolved, CPU))
    leaves = [module for module in get_z3_leaf_modules(engine.module) if isinstance(module, Block)]
    engine.destroy()
    assert len(leaves) == expected


def test_weights_on_nvme_are_gathered_one_by_one():
    nvme = {"device": "nvme", "nvme_path": "/tmp"}
    assert not gathers_by_block({"zero_optimization": {"stage": 3, "offload_param": nvme}})
    assert gathers_by_block({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}})
    assert not gathers_by_block({"zero_optimization": {"stage": 2}})


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_untied_and_checkpointed_models_train_alike(stage):
    steps = make_steps(3)
    untied = ModelConfig(**{**MODEL.to_dict(), "tie_word_embeddings": False, "qk_norm": False})
    resolved = resolve(stage, model=untied, activation_checkpointing=True)
    losses, _, found = train(resolved, steps)
    plain_losses, _, plain = train_plainly(steps, model=untied)
    assert losses == pytest.approx(plain_losses, rel=1e-5)
    assert_close(found, plain)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_four_micro_batches_are_one_of_four_times_the_size(stage):
    split = make_steps(4, micro_batches=4, size=1)
    whole = [[tuple(torch.cat(parts) for parts in zip(*step, strict=True))] for step in split]
    four = train(resolve(stage, micro_batch_size=1, gradient_accumulation_steps=4), split)
    one = train(resolve(stage, micro_batch_size=4), whole)
    assert four[0] == pytest.approx(one[0], rel=1e-5)
    assert four[1] == pytest.approx(one[1], rel=1e-4)
    assert_close(four[2], one[2])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_follows_fp32(stage):
    steps = make_steps(4, micro_batches=2)
    fp32 = train(resolve(stage, gradient_accumulation_steps=2), steps)
    bf16 = train(resolve(stage, gradient_accumulation_steps=2, precision="bf16"), steps)
    assert bf16[0] == pytest.approx(fp32[0], rel=2e-2)
    assert bf16[0] != fp32[0], "bf16 was not used"
    assert all(tensor.dtype == torch.float32 for tensor in bf16[2].values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_nan_gradient_leaves_no_trace(stage, precision):
    """Weights stay, and so do the optimizer's moments and its count of steps: what follows is bit for bit the same."""
    steps = make_steps(4, micro_batches=2)
    resolved = resolve(stage, precision=precision, gradient_accumulation_steps=2)
    clean = train(resolved, steps)
    spoilt = train(resolved, steps, spoil_at=2)
    assert spoilt[0] == clean[0] and spoilt[1] == clean[1]
    assert_equal(spoilt[2], clean[2])


@pytest.mark.parametrize("stage", [0, 1])
def test_on_one_rank_nothing_is_averaged_and_no_sum_changes(monkeypatch, stage):
    steps = make_steps(4, micro_batches=2)
    settings = {"precision": "bf16", "gradient_accumulation_steps": 2}
    averaged: list[int] = []
    real = deepspeed.DeepSpeedEngine.allreduce_bucket

    def watch(engine, bucket, *args, **others):
        averaged.append(len(bucket))
        return real(engine, bucket, *args, **others)

    monkeypatch.setattr(deepspeed.DeepSpeedEngine, "allreduce_bucket", watch)
    shipped = load_ds_config(f"ds_configs/zero{stage}.json")
    found = train(resolve(stage, ds={"bf16": shipped["bf16"]} if stage else None, **settings), steps, spoil_at=2)
    assert not averaged
    monkeypatch.setattr("minimind.parallel.engine.nothing_to_reduce", lambda *_: False)
    plain = train(resolve(stage, ds={"communication_data_type": "fp32"}, **settings), steps, spoil_at=2)
    assert averaged
    assert found[:2] == plain[:2]
    assert_equal(found[2], plain[2])


def test_autocast_under_zero_holds_nan_back_too():
    resolved = resolve(1, precision="bf16", ds={"torch_autocast": {"enabled": "auto"}})
    steps = make_steps(3)
    assert_equal(train(resolved, steps)[2], train(resolved, steps, spoil_at=1)[2])


@pytest.mark.parametrize("stage", [2, 3])
def test_matrices_decay_and_norms_do_not(stage):
    resolved = resolve(stage)
    model = build_model(resolved, CPU)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, plain = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    assert all("norm" in names[id(parameter)] for parameter in plain["params"])
    assert not any("norm" in names[id(parameter)] for parameter in decayed["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names), "tied weights stand once"


def test_every_stage_starts_from_the_same_weights():
    states = []
    for stage in (0, 3):
        engine = build_engine(resolve(stage), build_model(resolve(stage), CPU))
        states.append(weights(engine))
        engine.destroy()
    assert_equal(*states)


def test_clipping_measures_what_torch_measures():
    torch.manual_seed(0)
    models = [nn.Linear(30, 40), nn.Linear(30, 40)]
    for parameter, other in zip(*(model.parameters() for model in models), strict=True):
        parameter.grad = torch.randn_like(parameter)
        other.grad = parameter.grad.clone()
    norm = clip_gradients(models[0], 0.5)
    expected = nn.utils.clip_grad_norm_(models[1].parameters(), 0.5)
    assert float(norm) == pytest.approx(float(expected), rel=1e-6)
    torch.testing.assert_close(models[0].weight.grad, models[1].weight.grad)
    assert not torch.isfinite(clip_gradients(poisoned(models[0]), 0.5))


def poisoned(model: nn.Module) -> nn.Module:
    next(model.parameters()).grad[0, 0] = float("nan")
    return model


class Engine:
    """Only what `set_learning_rate` touches."""

    def __init__(self, *groups: dict[str, Any]) -> None:
        self.optimizer = type("Optimizer", (), {"param_groups": list(groups)})()


def test_rates_of_the_json_move_in_proportion():
    ds = {
        "zero_optimization": {"stage": 1, "reduce_scatter": False},
        "optimizer": {"type": "Muon", "params": {"lr": 1e-3, "muon_lr": 0.02, "adam_lr": 5e-4}},
    }
    resolved = resolve(1, ds=ds, lr=None, betas=None, eps=None, weight_decay=None)
    engine = Engine({"use_muon": True, "lr": 0.0}, {"use_muon": False, "lr": 0.0})
    set_learning_rate(engine, resolved, 5e-4)
    assert [group["lr"] for group in engine.optimizer.param_groups] == pytest.approx([0.01, 2.5e-4])
    engine = Engine({"lr": 0.0}, {"lr": 0.0})
    set_learning_rate(engine, resolve(1), LR / 2)
    assert [group["lr"] for group in engine.optimizer.param_groups] == [LR / 2, LR / 2]


def test_muon_trains():
    ds = {"zero_optimization": {"stage": 2, "reduce_scatter": False}, "gradient_clipping": 0.0}
    resolved = resolve(2, ds=ds, optimizer="muon", max_grad_norm=None)
    steps = make_steps(1) * 6
    losses, _, _ = train(resolved, steps)
    assert losses[-1] < losses[0] - 0.5
    assert_equal(train(resolved, steps[:3])[2], train(resolved, steps[:3], spoil_at=1)[2])


def test_an_op_that_cannot_be_built_is_one_line_before_the_start(monkeypatch):
    monkeypatch.setattr(deepspeed_check.cpp_extension, "CUDA_HOME", None)
    with pytest.raises(UserError, match=r"compile\.deepcompile needs the CUDA toolkit"):
        deepspeed_check.check_ops({"compile": {"deepcompile": True}})
    nvme = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/tmp"}}}
    monkeypatch.setattr(deepspeed_check.AsyncIOBuilder, "is_compatible", lambda self, verbose: False)
    with pytest.raises(UserError, match=r"offload to nvme needs DeepSpeed's async_io op.*libaio-dev"):
        deepspeed_check.check_ops(nvme)
    deepspeed_check.check_ops({"zero_optimization": {"stage": 3}})


def runs_here(row: Row, stage: int) -> bool:
    """Whether the table says that a row runs on a CPU, in words that change what an engine is built of."""
    changes = ("optimizer.type", "scheduler.type", "bf16", "torch_autocast", "data_types", "prescale", "gradient_pre")
    return row.key.startswith(changes) and row.verdict(stage, False, "cpu")[0] != "refused"


@pytest.mark.parametrize(
    ("row", "stage"),
    [(row, stage) for stage in (0, 2) for row in TABLE if runs_here(row, stage)],
    ids=lambda value: value.key if isinstance(value, Row) else str(value),
)
def test_what_the_table_lets_run_takes_steps(row, stage):
    run = RunConfig(model=MODEL, data=DataConfig(seq_len=16), train=TrainConfig(steps=2, micro_batch_size=4))
    losses, _, _ = train(resolve_run(run, row.example_json(stage), dp_size=1), make_steps(2))
    assert all(map(math.isfinite, losses))


def test_no_loss_scale_but_in_fp16():
    engine = build_engine(resolve(1), build_model(resolve(1), CPU))
    assert loss_scale(engine) is None
    engine.destroy()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_compiled_model_trains_alike(stage):
    steps = make_steps(3)
    small = ModelConfig(**{**MODEL.to_dict(), "num_hidden_layers": 1})
    eager = train(resolve(stage, model=small), steps)
    compiled = train(resolve(stage, model=small, compile=True), steps)
    assert compiled[0] == pytest.approx(eager[0], rel=1e-5)
    assert_close(compiled[2], eager[2], 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_offloaded_states_train_alike(stage):
    """DeepSpeed's CPU Adam is compiled on first use, into the folder that TORCH_EXTENSIONS_DIR names."""
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    if stage == 3:
        zero["offload_param"] = {"device": "cpu"}
    steps = make_steps(4, micro_batches=2)
    settings = {"gradient_accumulation_steps": 2}
    losses, norms, found = train(resolve(stage, ds={"zero_optimization": zero}, **settings), steps)
    plain_losses, plain_norms, plain = train_plainly(steps)
    assert losses == pytest.approx(plain_losses, rel=1e-5)
    assert norms == pytest.approx(plain_norms, rel=1e-4)
    assert_close(found, plain)
    offloaded = resolve(stage, ds={"zero_optimization": zero}, **settings)
    assert_equal(train(offloaded, steps)[2], train(offloaded, steps, spoil_at=2)[2])
