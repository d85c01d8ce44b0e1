"""The table of DeepSpeed's keys, walked: every row at every stage, dense and experts, for a CPU and for CUDA."""

import copy
from typing import Any

import pytest
from deepspeed.runtime.config import (
    _REMOVED_TOP_LEVEL_CONFIG_KEYS,
    _REMOVED_ZERO_CONFIG_KEYS,
    DEEPSPEED_OPTIMIZERS,
)
from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from expert_runs import DENSE, EXPERTS

from minimind.config.deepspeed_table import SECTIONS, STAGES, TABLE, Row, settle_table
from minimind.config.resolve import resolve_run
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import DataConfig, RunConfig, TrainConfig
from minimind.errors import UserError
from minimind.model.config import ModelConfig
from minimind.parallel.deepspeed_check import check_ds_config


def resolve(ds: dict[str, Any], *, experts: bool = False, device: str = "cpu", dp_size: int = 2) -> ResolvedRun:
    """As a command does before any rank starts."""
    run = RunConfig(
        model=ModelConfig(**(EXPERTS if experts else DENSE)),
        data=DataConfig(seq_len=16),
        train=TrainConfig(steps=10),
    )
    resolved = resolve_run(
        run, ds, world_size=dp_size, local_world_size=dp_size, device_type=device, bf16_supported=device == "cuda"
    )
    if device == "cpu":  # DeepSpeed's parsers ask for no device
        check_ds_config(resolved.ds)
    return resolved


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.key)
def test_the_table_says_what_happens(row: Row, experts: bool, device: str):
    name = row.key.replace("=", " ")
    for stage in STAGES:
        verdict, words = row.verdict(stage, experts, device)
        try:
            notes = resolve(row.example_json(stage), experts=experts, device=device).notes
        except UserError as error:
            assert verdict == "refused", (stage, str(error))
            assert str(error) == f"DeepSpeed config: {name}: {words}"
            continue
        said = [note for note in notes if note.startswith(f"{name}: ")]
        assert verdict == ("note" if said else "runs"), (stage, said)
        assert all(words in note for note in said)


@pytest.mark.parametrize("row", [row for row in TABLE if row.rules and "=" not in row.key], ids=lambda row: row.key)
def test_what_asks_for_nothing_is_never_refused(row: Row):
    values = [None, False, "auto", {"enabled": False}] if isinstance(row.example, dict) else [None, False, "auto"]
    for value in (*values, *row.off):
        off = Row(row.key, value, off=row.off, beside=row.beside)
        for stage in STAGES:
            settle_table(off.example_json(stage), experts=False, device="cpu")


def test_no_key_of_deepspeeds_is_missing():
    keys = {row.key.split("=")[0] for row in TABLE} | {row.key.lower() for row in TABLE}
    old = {"cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory", "stage3_gather_fp16_weights_on_model_save"}
    zero = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()} - old
    assert zero | set(_REMOVED_ZERO_CONFIG_KEYS) <= {key.removeprefix("zero_optimization.") for key in keys}
    for section, fields in (("bf16", DeepSpeedBF16Config), ("fp16", DeepSpeedFP16Config)):
        assert {f"{section}.{name}" for name in fields.model_fields} <= keys
    assert set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) <= SECTIONS
    assert {f"optimizer.type={kind}" for kind in DEEPSPEED_OPTIMIZERS} <= keys
    assert {f"scheduler.type={kind}".lower() for kind in VALID_LR_SCHEDULES} <= keys


def test_a_switch_deep_inside_is_seen():
    quiet = {"weight_quantization": {"shared_parameters": {"enabled": False}, "different_groups": {}}}
    loud = copy.deepcopy(quiet)
    loud["weight_quantization"]["shared_parameters"]["enabled"] = True
    for block, said in ((quiet, "off, passed over"), (loud, "passed over; removed from DeepSpeed")):
        (note,) = resolve({"compression_training": block}).notes
        assert said in note


@pytest.mark.parametrize(
    ("ds", "words"),
    [
        ({"zero_optimisation": {}}, "unknown section 'zero_optimisation'; did you mean 'zero_optimization'?"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "did you mean 'grad_accum_dtype'?"),
        ({"checkpoint": {"tag_validate": "Warn"}}, "did you mean 'tag_validation'?"),
        ({"optimizer": {"type": "AdamW", "params": {"beta": [0.9, 0.9]}}}, "did you mean 'betas'?"),
        ({"optimizer": {"type": "AdamW", "parms": {}}}, "did you mean 'params'?"),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "in no checkpoint"),
        ({"zero_optimization": {"stage": 2, "elastic_checkpoint": True}}, "loaded by nobody"),
        ({"zero_optimization": {"stage": 1}, "optimizer": {"type": "ASGD"}}, "cannot be resumed on other ranks"),
    ],
)
def test_a_mistake_is_one_line(ds, words):
    with pytest.raises(UserError) as error:
        resolve(ds)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_settings_that_need_each_other_run_together():
    for stage in (2, 3):
        ds = {"zero_optimization": {"stage": stage, "reduce_scatter": False}}
        for key, value in (("prescale_gradients", True), ("gradient_predivide_factor", 2.0)):
            assert resolve({**ds, key: value}).ds[key] == value
        offload = {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}}}
        for kind in ("Adagrad", "Lion"):
            assert resolve({**offload, "optimizer": {"type": kind}}).ds["optimizer"]["type"] == kind
