"""Which parameters decay, how gradients are clipped, how rates of several groups move."""

from typing import Any

import pytest
import torch
from engine_runs import CPU, LR, resolve
from torch import nn

from minimind.parallel.engine import build_model
from minimind.parallel.optimizer import clip_gradients, parameter_groups, set_learning_rate

pytestmark = pytest.mark.usefixtures("group")


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
    ds = {"optimizer": {"type": "Muon", "params": {"lr": 1e-3, "muon_lr": 0.02, "adam_lr": 5e-4}}}
    resolved = resolve(1, ds=ds, lr=None, betas=None, eps=None, weight_decay=None)
    engine = Engine(*({"kind": kind, "lr": 0.0} for kind in ("muon", "matrices", "vectors")))
    set_learning_rate(engine, resolved, resolved.train.lr / 2)
    assert [group["lr"] for group in engine.optimizer.param_groups] == pytest.approx([0.01, 2.5e-4, 2.5e-4])
    engine = Engine({"lr": 0.0}, {"lr": 0.0})
    set_learning_rate(engine, resolve(1), LR / 2)
    assert [group["lr"] for group in engine.optimizer.param_groups] == [LR / 2, LR / 2]
