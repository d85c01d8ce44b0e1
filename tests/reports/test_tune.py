"""The search for rate and batch: on losses that are known, and by real runs."""

import json
import math
import time
from pathlib import Path

import pytest
from training_runs import MODEL

from minimind import tune
from minimind.config.run_config import RunConfig, TrainConfig
from minimind.errors import UserError
from minimind.reports import tune as search
from minimind.reports.tune import Tuner, show_trials

RUN = RunConfig(train=TrainConfig(lr=1e-3, muon_lr=0.02, optimizer="muon", micro_batch_size=4, global_batch_size=8))


def known(monkeypatch: pytest.MonkeyPatch, best_lr: float, runs: int = 99, chance: float = 0.01) -> Tuner:
    """A tuner whose runs end at a loss that says how far their rate is from `best_lr`; 64 times that breaks off."""
    tuner = Tuner(RUN, time.perf_counter() + 1e6)

    def train(folder: Path, **fields):
        off = math.log2(fields["lr"] / best_lr)
        loss = None if off > 5 else 3 + 0.1 * off**2 + chance * (fields["seed"] != RUN.train.seed)
        assert fields["muon_lr"] == pytest.approx(20 * fields["lr"], rel=0.01)
        assert fields["global_batch_size"] * fields["steps"] == 800
        assert fields["global_batch_size"] % fields["micro_batch_size"] == 0
        return [{"eval_loss": loss, "step": fields["steps"]}]

    monkeypatch.setattr(tuner, "_measure", lambda: setattr(tuner, "steps", 100))
    monkeypatch.setattr(tuner, "_train", train)
    monkeypatch.setattr(tuner, "has_time", lambda: len(tuner.trials) < runs)
    return tuner


@pytest.mark.parametrize("doublings", [-9, -5, 0, 1, 3])
def test_the_best_rate_is_found_from_wherever_the_search_begins(monkeypatch, doublings):
    tuner = known(monkeypatch, 1e-3 * 2.0**doublings)
    tuner.search()
    assert tuner.best().doublings == doublings and tuner.best().loss == pytest.approx(3, abs=1e-3)
    tried = {trial.doublings for trial in tuner.trials if trial.batch == 8}
    assert {doublings - 1, doublings + 1} <= tried and len(tuner.trials) < 16
    assert {trial.batch for trial in tuner.trials} == {4, 8, 16} and tuner.noise() == pytest.approx(0.01, abs=1e-6)
    shown = show_trials(tuner)
    assert f"take      --lr {1e-3 * 2.0**doublings:.3g} --muon-lr" in shown and "lie 0.0100 apart" in shown
    assert "edge" not in shown and ("broke off" in shown) == (doublings < -3)


def test_rates_that_all_break_off_are_one_line(monkeypatch):
    with pytest.raises(UserError, match=r"every run broke off, down to --lr 6.25e-05 --muon-lr 0.00125: begin"):
        known(monkeypatch, 1e-7, runs=3).search()


def test_what_the_time_did_not_reach_is_said(monkeypatch):
    tuner = known(monkeypatch, 1.0, runs=2)
    tuner.search()
    assert [trial.doublings for trial in tuner.trials] == [0, 2]
    shown = show_trials(tuner)
    assert "at the edge of what was tried" in shown and "how much of a difference is chance is not known" in shown


def test_rates_that_chance_does_not_tell_apart_are_named(monkeypatch):
    tuner = known(monkeypatch, 1e-3, chance=0.15)
    tuner.search()
    assert "no worse than that: --lr 0.0005 --muon-lr 0.01, --lr 0.001 --muon-lr 0.02, --lr 0.002" in show_trials(tuner)


def test_shards_without_a_validation_split_are_one_line(monkeypatch):
    tuner = Tuner(RUN, time.perf_counter() + 1e6)
    monkeypatch.setattr(tuner, "_train", lambda folder, **fields: [{"loss": 1.0, "step": 1, "step_seconds": 1.0}])
    with pytest.raises(UserError, match="no validation split"):
        tuner.search()


@pytest.mark.slow
def test_the_command_runs_the_trainer_and_writes_what_it_found(tmp_path, tiny_corpus, monkeypatch, capsys):
    monkeypatch.setattr(search, "PLANNED_RUNS", 1)
    monkeypatch.setattr(search, "FEWEST_STEPS", 1)
    monkeypatch.setattr(Tuner, "has_time", lambda self: len(self.trials) < 2)
    fields = {**MODEL, "shards": tiny_corpus, "seq_len": 16, "steps": 3, "output": tmp_path / "tune", "minutes": 1000}
    flags = [word for name, value in fields.items() for word in ("--" + name.replace("_", "-"), str(value))]
    assert tune.main([*flags, "--lr", "1e-3"]) == 0
    assert "take      --lr" in capsys.readouterr().out
    trials = json.loads((tmp_path / "tune" / "tune.json").read_text())
    assert [trial["lr"] for trial in trials] == [1e-3, 4e-3] and {trial["batch"] for trial in trials} == {8}
    assert trials[0]["loss"] != trials[1]["loss"] and 0 < trials[0]["loss"] < 10
    assert (tmp_path / "tune" / "tune.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="does not exist"):
        tune.main([*flags, "--shards", str(tmp_path / "none")])
    monkeypatch.setattr(search, "FEWEST_STEPS", 10**9)
    with pytest.raises(UserError, match=r"--minutes: too short for 1 runs .* give at least \d+"):
        tune.main(flags)
