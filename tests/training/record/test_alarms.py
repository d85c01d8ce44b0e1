"""Alarms: each on a run made sick on purpose, none on a healthy one; and the rules by themselves on made-up records."""

import dataclasses
import time
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from structured_corpus import write_corpus
from training_runs import RankPool, flags_for, rank_pool, read_metrics, train

from minimind.training import trainer
from minimind.training.record import alarms
from minimind.training.record.alarms import AlarmWatch, Limits
from minimind.training.record.events import Event, read_events, write_event

# A short window, and times of milliseconds instead of half a minute.
QUICK = Limits(window=20, least_seconds=0.0)


def raised(run_dir: Path) -> list[Event]:
    return [event for event in read_events(run_dir) if event.event == "alarm"]


def train_watched(flags: list[str], limits: Limits = QUICK) -> str:
    real = alarms.AlarmWatch.__init__

    def start(watch: AlarmWatch, _limits: Any = None, hosts: Any = ()) -> None:
        real(watch, limits, hosts)

    with unittest.mock.patch.object(alarms.AlarmWatch, "__init__", start):
        return train(flags)[1]


def sick_flags(corpus: Path, run_dir: Path, **others: Any) -> list[str]:
    return flags_for(corpus, run_dir, **{"save_every": 0, "steps": 60, "lr": 1e-3, **others})


@pytest.mark.slow
def test_a_healthy_run_of_500_steps_raises_none(tiny_corpus, tmp_path):
    flags = sick_flags(tiny_corpus, tmp_path / "run", steps=500, eval_every=50, micro_batch_size=4, warmup_steps=20)
    _, printed = train(flags)
    assert [record["step"] for record in read_metrics(tmp_path / "run") if "loss" in record] == list(range(1, 501))
    assert raised(tmp_path / "run") == [] and "alarm" not in printed
    assert [event.event for event in read_events(tmp_path / "run")] == ["start", "save", "finish"]


def test_a_batch_of_garbage_is_a_loss_spike(tiny_corpus, tmp_path, monkeypatch):
    step_batches = trainer.BatchLoader.step_batches

    def garbled(loader, step):
        batches = step_batches(loader, step)
        if step != 55:
            return batches
        # Tokens that never follow one another in this corpus.
        return [dataclasses.replace(batch, labels=(batch.labels + 101) % 256) for batch in batches]

    monkeypatch.setattr(trainer.BatchLoader, "step_batches", garbled)
    # Large steps for so small a model: by step 55 it knows the corpus well enough to be surprised.
    wide = {"hidden_size": 64, "lr": 1e-2, "global_batch_size": 32, "micro_batch_size": 32, "seq_len": 32}
    printed = train_watched(sick_flags(tiny_corpus, tmp_path / "run", **wide))
    (event,) = [event for event in raised(tmp_path / "run") if event.kind == "loss_spike"]
    assert event.step == 56 and f"alarm: step 56: {event.message}" in printed


def test_a_rate_that_explodes_is_a_gradient_drift(tiny_corpus, tmp_path, monkeypatch):
    clip = trainer.optimizer_step

    def grow(engine, resolved):
        norm = clip(engine, resolved)
        with torch.no_grad():
            if engine.global_steps > 25:
                engine.module.lm_head.weight.mul_(1.2)  # the weights run away
        return norm

    monkeypatch.setattr(trainer, "optimizer_step", grow)
    train_watched(sick_flags(tiny_corpus, tmp_path / "run", stage=0))
    assert "gradient_drift" in {event.kind for event in raised(tmp_path / "run")}


def test_a_slowed_run_lost_throughput(tiny_corpus, tmp_path, monkeypatch):
    step = trainer.optimizer_step

    def throttled(engine, resolved):
        time.sleep(0.06 if engine.global_steps > 30 else 0.02)
        return step(engine, resolved)

    monkeypatch.setattr(trainer, "optimizer_step", throttled)
    train_watched(sick_flags(tiny_corpus, tmp_path / "run"))
    assert "throughput" in {event.kind for event in raised(tmp_path / "run")}


def test_a_slow_disk_is_waiting_for_data(tiny_corpus, tmp_path, monkeypatch):
    step_batches = trainer.BatchLoader.step_batches

    def slow(loader, step):
        time.sleep(0.08)
        return step_batches(loader, step)

    monkeypatch.setattr(trainer.BatchLoader, "step_batches", slow)
    train_watched(sick_flags(tiny_corpus, tmp_path / "run", steps=30))
    (event,) = [event for event in raised(tmp_path / "run") if event.kind == "data_wait"]
    assert "of a step is waiting for data" in event.message


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    yield from rank_pool(2)


def train_with_a_slow_rank(flags: list[str], slow: int) -> None:
    import os

    from minimind.model import MiniMindForCausalLM

    forward = MiniMindForCausalLM.forward

    def slowed(model, *args, **kwargs):
        if int(os.environ["RANK"]) == slow:
            time.sleep(0.08)
        return forward(model, *args, **kwargs)

    with unittest.mock.patch.object(MiniMindForCausalLM, "forward", slowed):
        train_watched(flags)


def test_a_slow_rank_is_named(tiny_corpus, tmp_path, two_ranks):
    import socket

    two_ranks.run(train_with_a_slow_rank, sick_flags(tiny_corpus, tmp_path / "run", steps=40), 1)
    (event,) = [event for event in raised(tmp_path / "run") if event.kind == "slow_rank"]
    assert event.message.startswith(f"rank 1 on {socket.gethostname()} takes ")
    assert "slowest_rank" in read_metrics(tmp_path / "run")[0]


def test_a_corpus_learnt_by_heart_is_said(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", tokens=1500, val_tokens=1500)
    flags = sick_flags(
        corpus, tmp_path / "run", steps=240, eval_every=30, lr=6e-3, hidden_size=96, global_batch_size=32,
        micro_batch_size=32, seq_len=32, weight_decay=0.0, schedule="constant",
    )  # fmt: skip
    train_watched(flags)
    assert "overfitting" in {event.kind for event in raised(tmp_path / "run")}


def record(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "loss": 2.0, "grad_norm": 1.0, "tokens_per_second": 1e4, "step_seconds": 1.0, **values}


def kinds(watch: AlarmWatch, records: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(alarm.kind, alarm.step) for item in records for alarm in watch.observe(item)]


def test_a_loss_scale_that_collapses():
    """fp16 needs a GPU: the records are those that such a run would write."""
    scales = [65536.0] * 30 + [65536.0 / 2**i for i in range(1, 17)]
    found = kinds(AlarmWatch(), [record(i + 1, loss_scale=scale) for i, scale in enumerate(scales)])
    assert found == [("loss_scale_collapse", 38)]
    settling = [65536.0 / 2 ** min(i, 4) for i in range(100)]
    assert kinds(AlarmWatch(), [record(i + 1, loss_scale=scale) for i, scale in enumerate(settling)]) == []


def test_experts_that_die_are_named():
    loads = [[[100, 100, 100, 100], [200, 199, 1, 0]]] * 60
    watch = AlarmWatch()
    found = [alarm for i, load in enumerate(loads) for alarm in watch.observe(record(i + 1, expert_load=load))]
    assert [(alarm.kind, alarm.step) for alarm in found] == [("dying_expert", 50)]
    assert "expert 2 of expert layer 1, 3 of expert layer 1" in found[0].message
    even = [[[90, 110, 105, 95], [50, 60, 250, 40]]] * 60
    assert kinds(AlarmWatch(), [record(i + 1, expert_load=load) for i, load in enumerate(even)]) == []


def test_an_alarm_is_given_once_and_again_after_it_had_passed():
    waiting = [record(i, data_seconds=0.5) for i in range(1, 80)]
    fine = [record(i, data_seconds=0.0) for i in range(80, 160)]
    again = [record(i, data_seconds=0.5) for i in range(160, 240)]
    found = kinds(AlarmWatch(), waiting + fine + again)
    assert [kind for kind, _ in found] == ["data_wait", "data_wait"] and found[0][1] == 50 and found[1][1] > 160


def test_times_that_are_short_are_not_judged():
    quick = [record(i, step_seconds=0.01, data_seconds=0.005, tokens_per_second=1e4 / i) for i in range(1, 200)]
    assert kinds(AlarmWatch(), quick) == []


def test_noise_and_figures_that_are_missing_raise_none():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(500, 3, generator=generator).tolist()
    records = [
        record(
            i + 1,
            loss=3 + 2 / (1 + i / 50) + 0.1 * a,
            grad_norm=1 + 0.3 * abs(b),
            tokens_per_second=1e4 * (1 + 0.05 * c),
        )
        for i, (a, b, c) in enumerate(noise)
    ]
    assert kinds(AlarmWatch(), records) == []
    strange = [{"step": i, "loss": None, "grad_norm": None, "mfu": None} for i in range(100)]
    assert kinds(AlarmWatch(), strange) == []


def test_events_survive_a_line_that_was_cut(tmp_path):
    assert read_events(tmp_path) == []
    write_event(tmp_path, "start", 0, "started")
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"step": 3, "ev')
    write_event(tmp_path, "alarm", 4, "look", "loss_spike")
    assert [(event.step, event.event, event.kind) for event in read_events(tmp_path)] == [
        (0, "start", ""), (4, "alarm", "loss_spike")
    ]  # fmt: skip
    assert read_events(tmp_path)[1].time > 1.7e9
