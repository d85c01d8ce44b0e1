"""What a resolved run says: its length, ZeRO's settings as values, and a form that can be given again."""

import dataclasses
from typing import Any

import pytest

from minimind.config.deepspeed_file import load_ds_config
from minimind.config.resolve import resolve_run
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import DataConfig, RunConfig, TrainConfig
from minimind.errors import UserError


def resolve(ds: dict[str, Any] | None = None, *, num_samples: int | None = None, **train: Any) -> ResolvedRun:
    run = RunConfig(train=TrainConfig(**{"micro_batch_size": 2, **train}))
    return resolve_run(run, load_ds_config(None) if ds is None else ds, world_size=2, num_samples=num_samples)


def test_the_length_follows_from_the_data():
    train = resolve(num_samples=4_000).train
    assert (train.steps, train.warmup_steps) == (1_000, 20)
    assert resolve(num_samples=4_000, epochs=2.5).train.steps == 2_500
    train = resolve(num_samples=4_000, steps=10, warmup_steps=0).train
    assert (train.steps, train.warmup_steps) == (10, 0), "a warm-up of 0 is a choice, not an unset one"
    with pytest.raises(UserError, match="global_batch_size: 4 samples a step, but 1 epochs of the shards hold 3"):
        resolve(num_samples=3)
    with pytest.raises(UserError, match="warmup_steps: 11 is longer than the run of 10 steps"):
        resolve(num_samples=40, warmup_steps=11)


@pytest.mark.parametrize(
    ("data", "train", "words"),
    [
        ({"seq_len": 30}, {}, "seq_len 30, which is no multiple of 4"),
        ({"document_mask": True}, {}, "a document mask, which cuts windows itself"),
        ({}, {"sp_size": 2}, "sp_size 2, which shares a window"),
        ({}, {"objective": "distill"}, "objective distill"),
    ],
)
def test_windows_that_cannot_come_in_parts_are_refused(data, train, words):
    run = RunConfig(data=DataConfig(window_warmup_steps=5, **data), train=TrainConfig(**train))
    with pytest.raises(UserError, match=f"^window_warmup_steps: 5 does not go with {words}; leave it out$"):
        resolve_run(run, load_ds_config(None), world_size=2)


def test_a_plan_without_data_knows_no_length_and_writes_none():
    resolved = resolve()
    assert (resolved.train.steps, resolved.train.warmup_steps) == (0, 0)
    assert resolved.run.train.steps is None and resolved.run.train.warmup_steps is None
    assert resolve(warmup_steps=5).run.train.warmup_steps == 5


@pytest.mark.parametrize(
    "ds",
    [
        None,
        {"optimizer": {"type": "SGD", "params": {"momentum": 0.9}}, "zero_optimization": {"stage": 1}},
        {"scheduler": {"type": "WarmupLR", "params": {}}, "zero_optimization": {"stage": 2}},
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
    ],
)
def test_what_is_written_can_be_given_again(ds):
    first = resolve(ds, num_samples=4_000)
    again = resolve_run(RunConfig.from_dict(first.run.to_dict()), first.ds, world_size=2)
    assert again == first
    assert first.run.train.ep_size is None, "a dense model has no expert parallelism to set"


def test_zero_settings_are_values():
    zero = resolve().zero
    assert (zero.stage, zero.weights, zero.weight_bytes, zero.offloaded) == (1, "fp32", 4, ())
    ds = {
        "zero_optimization": {
            "stage": 3, "offload_param": {"device": "cpu"}, "reduce_bucket_size": 1e6, "zero_hpz_partition_size": 2,
        },
        "bf16": {"enabled": True, "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    }  # fmt: skip
    zero = resolve(ds).zero
    assert (zero.stage, zero.weights, zero.weight_bytes, zero.offloaded) == (3, "bf16", 2, ("param",))
    assert (zero.reduce_bucket_size, zero.hpz_partition_size, zero.immediate_grad_update) == (1_000_000, 2, True)
    zero = resolve({"zero_optimization": {"stage": 0}}, precision="bf16").zero
    assert zero.autocast and zero.weights == "fp32", "under autocast the weights stay float32"
    assert dataclasses.replace(resolve(), ds=ds).zero.stage == 3
