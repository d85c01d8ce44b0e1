"""Balancing experts over the whole step: one batch, micro-batches and ranks are one run; an old run stays as it was."""

import json
from pathlib import Path

import pytest
import torch
from pytest import approx
from training_runs import EXPERTS, RankPool, flags_for, rank_pool, read_metrics, train

from minimind.model import MiniMindForCausalLM, ModelConfig
from minimind.model.router import balance_over

# The load shows in the loss, and nothing but it is moved by how a step is cut.
SETTINGS = {
    **EXPERTS, "router_bias_update_rate": 0.0, "router_aux_loss_coef": 0.1, "lr": 1e-2, "save_every": 0,
    "schedule": "constant",
}  # fmt: skip
FIGURES = ("loss", "aux_loss", "grad_norm")


@pytest.fixture(scope="module")
def pool():
    yield from rank_pool(2)


@pytest.fixture(scope="module")
def whole(tiny_corpus, tmp_path_factory) -> dict[str, list[float]]:
    """The run whose step is one batch on one rank: there the load is balanced over the step by nature."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train(flags_for(tiny_corpus, run_dir, **SETTINGS, micro_batch_size=4, aux_loss_scope="micro"))
    return figures(run_dir)


def figures(run_dir: Path) -> dict[str, list[float]]:
    steps = [record for record in read_metrics(run_dir) if "loss" in record]
    return {name: [step[name] for step in steps] for name in FIGURES}


def assert_same(found: dict[str, list[float]], expected: dict[str, list[float]]) -> None:
    assert len(found["loss"]) == len(expected["loss"]) == 6
    for name in FIGURES:
        assert found[name] == approx(expected[name], rel=1e-5), name


@pytest.mark.parametrize(
    "others",
    [
        {"micro_batch_size": 4},
        {"micro_batch_size": 2},
        {"stage": 0},
        {"stage": 2, "activation_checkpointing": True},
        {"stage": 3},
        {"stage": 3, "document_mask": True, "micro_batch_size": 4},
        {"moe_backend": "deepspeed"},
    ],
    ids=str,
)
def test_however_a_step_is_cut_it_is_one_batch(tiny_corpus, tmp_path, whole, others):
    if others.get("document_mask"):
        train(flags_for(tiny_corpus, tmp_path / "whole", **SETTINGS, micro_batch_size=4, document_mask=True))
        whole, others = figures(tmp_path / "whole"), {**others, "micro_batch_size": 1}
    train(flags_for(tiny_corpus, tmp_path / "run", **SETTINGS, **others))
    assert_same(figures(tmp_path / "run"), whole)


@pytest.mark.parametrize(
    "others",
    [
        {"micro_batch_size": 2},
        {"stage": 0},
        {"stage": 3},
        {"stage": 2, "ep_size": 2, "activation_checkpointing": True},
        {"moe_backend": "deepspeed", "ep_size": 2},
    ],
    ids=str,
)
def test_two_ranks_are_one_batch(pool: RankPool, tiny_corpus, tmp_path, whole, others):
    pool.run(train, flags_for(tiny_corpus, tmp_path / "run", **SETTINGS, **others))
    assert_same(figures(tmp_path / "run"), whole)


def test_micro_batches_that_balance_by_themselves_are_another_run(tiny_corpus, tmp_path, whole):
    """What the other form costs, so that the tests above are no matter of course."""
    train(flags_for(tiny_corpus, tmp_path / "run", **SETTINGS, aux_loss_scope="micro"))
    found = figures(tmp_path / "run")
    assert found["loss"] != approx(whole["loss"], rel=1e-4) and found["grad_norm"] != approx(
        whole["grad_norm"], rel=1e-3
    )


@pytest.mark.parametrize("cut", [{"micro_batch_size": 1}, {"micro_batch_size": 2, "stage": 3}], ids=str)
def test_a_resume_that_cuts_a_step_otherwise_goes_on_the_same(pool: RankPool, tiny_corpus, tmp_path, whole, cut):
    """One batch on one rank, then micro-batches on two."""
    train(flags_for(tiny_corpus, tmp_path, **{**SETTINGS, "save_every": 2}, micro_batch_size=4, steps=2))
    pool.run(train, flags_for(tiny_corpus, tmp_path, **SETTINGS, **cut))
    assert_same(figures(tmp_path), whole)


def test_a_run_keeps_the_form_it_began_with(tiny_corpus, tmp_path):
    """Without the flag a new run balances over the step, and one that began before there was a choice as it did."""
    flags = flags_for(tiny_corpus, tmp_path / "micro", **SETTINGS, aux_loss_scope="micro")
    train(flags)
    train(flags_for(tiny_corpus, tmp_path / "new", **SETTINGS, steps=2))
    assert json.loads((tmp_path / "new/run_config.json").read_text())["model"]["aux_loss_scope"] == "global"
    train(flags_for(tiny_corpus, tmp_path / "old", **{**SETTINGS, "save_every": 2}, aux_loss_scope="micro", steps=2))
    path = tmp_path / "old/run_config.json"
    content = json.loads(path.read_text())
    del content["model"]["aux_loss_scope"]  # as it was written before
    path.write_text(json.dumps(content))
    _, said = train(flags_for(tiny_corpus, tmp_path / "old", **SETTINGS))
    assert figures(tmp_path / "old") == figures(tmp_path / "micro") and "aux_loss_scope" not in said
    assert json.loads(path.read_text())["model"]["aux_loss_scope"] == "micro"
    _, said = train([*flags_for(tiny_corpus, tmp_path / "old", **SETTINGS, steps=7), "--aux-loss-scope", "global"])
    assert "changed: aux_loss_scope is global from here on; it was micro" in said


def test_the_step_s_share_makes_parts_add_up_to_the_whole():
    """The mean of the parts' losses, and its gradient, are the whole batch's."""
    config = ModelConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, use_moe=True,
        num_experts_per_tok=2, router_aux_loss_coef=1.0, router_z_loss_coef=0.1, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model, tokens = MiniMindForCausalLM(config), torch.randint(3, 32, (4, 9))

    def read(rows: torch.Tensor):
        return model(rows[:, :-1], rows[:, 1:])

    whole = read(tokens)
    whole.aux_loss.backward()
    expected = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    parts = [read(rows) for rows in tokens.split(1)]
    share = torch.stack([part.expert_share for part in parts]).mean(dim=0)
    assert torch.allclose(share, whole.expert_share) and torch.allclose(share.sum(dim=-1), torch.ones(2))
    own = torch.stack([part.aux_loss for part in parts]).mean()
    assert own.item() != approx(whole.aux_loss.item(), rel=1e-3)
    total = torch.stack(
        [balance_over(share, part.aux_loss, part.expert_share, part.expert_score, config) for part in parts]
    ).mean()
    assert total.item() == approx(whole.aux_loss.item(), rel=1e-5)
    total.backward()
    for name, gradient in expected.items():
        assert torch.allclose(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-7), name
