"""The table of what a continuation may change."""

import dataclasses
import unittest.mock

from minimind.checkpoints.run_state import AT_RESUME, DataFingerprint, describe_run
from minimind.config.deepspeed_file import load_ds_config
from minimind.config.resolve import resolve_run
from minimind.config.run_config import DataConfig, RunConfig, TrainConfig
from minimind.model.config import ModelConfig


def test_the_table_names_what_there_is():
    resolved = resolve_run(RunConfig(), load_ds_config(None), world_size=1)
    with unittest.mock.patch("torch.distributed.get_world_size", lambda: 1):
        described = describe_run(resolved, DataFingerprint("", ""))
    layout, sampling = described["layout"], described["sampling"]
    # The optimizer decides the layout, and is fixed besides.
    assert {AT_RESUME[name] for name in layout if name != "optimizer"} == {"topology"}
    assert {AT_RESUME[name] for name in (*sampling, "optimizer")} == {"fixed"}
    settings = {field.name for cls in (ModelConfig, DataConfig, TrainConfig) for field in dataclasses.fields(cls)}
    assert set(AT_RESUME) <= settings | set(layout) | {"world_size", "zero_stage", "tokenizer", "base"}


def test_what_changes_a_weight_or_a_sample_is_fixed():
    for name in ("hidden_size", "vocab_size", "num_experts", "rope_theta", "seq_len", "seed", "global_batch_size"):
        assert AT_RESUME[name] == "fixed"
    for name in ("lr", "steps", "micro_batch_size", "dropout", "router_aux_loss_coef"):
        assert AT_RESUME.get(name, "free") == "free"
