"""The load of experts in figures."""

import math

import torch
from pytest import approx

from minimind.model import CausalLMOutput
from minimind.training.objectives.objective import LossParts
from minimind.training.step_record import summarize_load


def test_the_counts_of_a_forward_end_with_the_dropped_choices():
    loss = torch.zeros(())
    load = torch.tensor([[3, 1], [2, 2]])
    output = CausalLMOutput(loss=loss, aux_loss=loss, expert_load=load, dropped=torch.tensor([1, 0]))
    assert LossParts.of(output).expert_counts.tolist() == [[3, 1, 1], [2, 2, 0]]
    assert LossParts.of(output._replace(dropped=None)).expert_counts.tolist() == [[3, 1, 0], [2, 2, 0]]
    assert LossParts.of(CausalLMOutput(loss=loss)).expert_counts is None


def test_figures_of_a_load():
    found = summarize_load(1, torch.tensor([[5, 5, 5, 5, 2], [20, 0, 0, 0, 10], [10, 10, 0, 0, 0]]))
    assert found["expert_load"] == [[5, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0]]
    layers = found["expert_balance"]
    assert layers["min"] == [5, 0, 0] and layers["max"] == [5, 20, 10]
    assert layers["entropy"] == approx([1.0, 0.0, 0.5])
    assert layers["dropped"] == approx([0.1, 0.5, 0.0])
    assert found["load_entropy"] == approx(0.5) and found["dropped_share"] == approx(0.2)


def test_one_expert_is_always_balanced():
    assert summarize_load(1, torch.tensor([[7, 0]]))["load_entropy"] == 1.0
    uneven = summarize_load(1, torch.tensor([[3, 1, 0]]))["load_entropy"]
    assert uneven == approx((0.75 * math.log(4 / 3) + 0.25 * math.log(4)) / math.log(2))
