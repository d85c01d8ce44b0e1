"""Every ZeRO stage on one rank against a plain torch loop; what a NaN gradient does.

The steps are taken as the trainer takes them: the summed loss, scaled to the targets of the whole step.
"""

import deepspeed
import pytest
import torch
from deepspeed.utils import get_z3_leaf_modules
from engine_runs import CPU, MODEL, assert_close, assert_equal, make_steps, resolve, train, train_plainly, weights

from minimind.config.deepspeed_file import load_ds_config
from minimind.model import ModelConfig
from minimind.model.transformer import Block
from minimind.parallel.engine import build_engine, build_model, gathers_by_block
from minimind.parallel.loss_scale import loss_scale

pytestmark = pytest.mark.usefixtures("group")


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


def test_every_stage_starts_from_the_same_weights():
    states = []
    for stage in (0, 3):
        engine = build_engine(resolve(stage), build_model(resolve(stage), CPU))
        states.append(weights(engine))
        engine.destroy()
    assert_equal(*states)


def test_no_loss_scale_but_in_fp16():
    engine = build_engine(resolve(1), build_model(resolve(1), CPU))
    assert loss_scale(engine) is None
    engine.destroy()
