"""What "auto" becomes in ZeRO's communication, and that it changes no step."""

from typing import Any

import pytest

from minimind.config.deepspeed_file import load_ds_config
from minimind.config.resolve import resolve_run
from minimind.config.run_config import RunConfig, TrainConfig
from minimind.model.config import ModelConfig

AUTOS = {"overlap_comm": "auto", "reduce_scatter": "auto", "reduce_bucket_size": "auto"}


def settle(stage: int, world_size: int, device_type: str, use_moe: bool = False, **given: Any) -> dict[str, Any]:
    shape = {name: given.pop(name) for name in list(given) if name in ModelConfig.__dataclass_fields__}
    ds = {"zero_optimization": {"stage": stage, **AUTOS, **given}}
    run = RunConfig(
        model=ModelConfig(use_moe=use_moe, **shape), train=TrainConfig(precision="bf16", micro_batch_size=1)
    )
    return resolve_run(run, ds, world_size=world_size, device_type=device_type).ds["zero_optimization"]


@pytest.mark.parametrize(
    ("stage", "world_size", "device_type", "use_moe", "expected"),
    [
        (2, 1, "cpu", False, (False, False, 20_000_000)),
        (2, 2, "cpu", False, (False, True, 20_000_000)),
        (2, 1, "cpu", True, (False, True, 20_000_000)),
        (3, 1, "cpu", False, (False, False, 50_000_000)),
        (1, 1, "cpu", False, (False, False, 200_000_000)),
        (1, 1, "cuda", False, (True, True, 7_989_024)),
        (3, 8, "cuda", False, (True, True, 7_989_024)),
    ],
)
def test_auto_is_what_the_device_wants(stage, world_size, device_type, use_moe, expected):
    zero = settle(stage, world_size, device_type, use_moe)
    assert (zero["overlap_comm"], zero["reduce_scatter"], zero["reduce_bucket_size"]) == expected


def test_buckets_and_prefetching_follow_the_model():
    """A small model's first bucket must not be its whole gradient; a large one's next block must fit the limits."""
    autos = dict.fromkeys(("stage3_prefetch_bucket_size", "stage3_max_live_parameters"), "auto")
    small = settle(3, 8, "cuda", num_hidden_layers=1, hidden_size=64, **autos)
    large = settle(3, 8, "cuda", num_hidden_layers=80, hidden_size=8192, intermediate_size=28672, **autos)
    names = ("reduce_bucket_size", *autos)
    assert [small[name] for name in names] == [5_000_000, 50_000_000, 1_000_000_000]
    bucket, prefetch, live = (large[name] for name in names)
    assert bucket == 50_000_000 and live == 3 * prefetch and 800_000_000 < prefetch < 1_000_000_000
    assert settle(2, 8, "cuda", num_hidden_layers=80, hidden_size=8192)["reduce_bucket_size"] == 200_000_000


def test_what_is_given_stays():
    given = {"overlap_comm": True, "reduce_scatter": True, "reduce_bucket_size": 7}
    zero = settle(2, 1, "cpu", **given)
    assert {name: zero[name] for name in given} == given


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_shipped_files_leave_nothing_open(stage):
    run = RunConfig(train=TrainConfig(micro_batch_size=1))
    resolved = resolve_run(run, load_ds_config(f"ds_configs/zero{stage}.json"), world_size=1)
    assert "auto" not in resolved.ds["zero_optimization"].values() and not resolved.notes
