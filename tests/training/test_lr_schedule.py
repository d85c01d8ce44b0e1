"""The learning rate of every step, against the figures that each schedule promises."""

import math

import pytest
from pytest import approx

from minimind.config.run_config import TrainConfig
from minimind.training.lr_schedule import learning_rate


def rates(schedule: str, **settings) -> list[float]:
    """Of all steps of a run, and of three beyond its end."""
    values = {"lr": 1.0, "steps": 100, "warmup_steps": 10, "min_lr_ratio": 0.1, **settings}
    train = TrainConfig(schedule=schedule, **values)
    return [learning_rate(step, train) for step in range(values["steps"] + 3)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd", "step", "exponential"])
def test_warm_up_is_a_line_to_the_peak_and_the_end_stays(schedule):
    found = rates(schedule, lr=2.0)
    assert found[:10] == approx([0.2 * (step + 1) for step in range(10)])
    assert found[10] == 2.0 and max(found) == 2.0
    assert found[10:] == sorted(found[10:], reverse=True), "the rate rises after the warm-up"
    if schedule not in ("step", "exponential"):
        assert found[100] == found[101] == found[102]
    assert min(found[10:]) >= 0.2 * (1 - 1e-12), "below the floor"


def test_the_shapes():
    assert rates("cosine")[55] == approx(0.1 + 0.9 * 0.5)
    assert rates("cosine")[33] == approx(0.1 + 0.45 * (1 + math.cos(math.pi * 23 / 90)))
    assert rates("linear")[55] == approx(0.55)
    assert rates("constant")[10:] == [1.0] * 93
    for schedule in ("cosine", "linear", "wsd"):
        assert rates(schedule)[100] == approx(0.1), "the floor is reached at the end"
        assert rates(schedule, min_lr_ratio=0.0)[100] == approx(0.0, abs=1e-12)
    wsd = rates("wsd", decay_ratio=0.2)
    assert wsd[10:81] == [1.0] * 71 and wsd[81] == approx(1 - 0.9 / 20) and wsd[90] == approx(0.55)
    step = rates("step", lr_step_size=30, lr_gamma=0.5)
    assert (step[39], step[40], step[69], step[70], step[100]) == (1.0, 0.5, 0.5, 0.25, 0.125)
    assert rates("step", lr_step_size=10, lr_gamma=0.1)[60] == 0.1
    exponential = rates("exponential", lr_step_size=30, lr_gamma=0.5)
    assert exponential[40] == approx(0.5) and exponential[25] == approx(0.5**0.5)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd", "step", "exponential"])
@pytest.mark.parametrize(
    "settings",
    [
        {"warmup_steps": 0},
        {"warmup_steps": 100},
        {"steps": 1, "warmup_steps": 1},
        {"steps": 1, "warmup_steps": 0},
        {"decay_ratio": 0.0},
        {"decay_ratio": 1.0},
        {"min_lr_ratio": 1.0},
        {"lr_gamma": 0.0, "lr_step_size": 1},
    ],
)
def test_the_edges_give_positive_finite_rates_up_to_the_peak(schedule, settings):
    steps = settings.get("steps", 100)
    found = rates(schedule, **settings)
    assert all(0 < rate <= 1.0 for rate in found[:steps])
    assert found[max(0, settings.get("warmup_steps", 10) - 1)] == 1.0, "the peak is never reached"
