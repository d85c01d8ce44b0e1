"""Engines of other kinds train as the plain one does: offloaded, Muon, and all that the table lets run."""

import math

import pytest
from engine_runs import (
    MODEL,
    assert_close,
    assert_equal,
    make_steps,
    resolve,
    train,
    train_plainly,
)

from minimind.config.deepspeed_table import TABLE, Row
from minimind.config.resolve import resolve_run
from minimind.config.run_config import DataConfig, RunConfig, TrainConfig
from minimind.errors import UserError
from minimind.parallel import deepspeed_check

pytestmark = pytest.mark.usefixtures("group")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_nan_gradient_leaves_no_trace_in_muon(stage):
    steps = make_steps(3)
    resolved = resolve(stage, optimizer="muon", precision="bf16" if stage == 1 else "fp32")
    assert_equal(train(resolved, steps)[2], train(resolved, steps, spoil_at=1)[2])


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
    losses, _, _ = train(resolve_run(run, row.example_json(stage), world_size=1), make_steps(2))
    assert all(map(math.isfinite, losses))


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
