"""A run that continues is the run that was never interrupted: bit for bit on the same ranks, whatever the topology
within rounding."""

import collections
import dataclasses
import json
import os
import shutil
import signal
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deepspeed.utils import safe_get_full_optimizer_state
from prepared_corpus import Prepare, make_texts, write_jsonl
from stream_hash import hash_stream
from structured_corpus import write_corpus
from training_runs import (
    EXPERTS,
    MODEL,
    NATIVE,
    ROOT,
    RankPool,
    flags_for,
    losses,
    rank_pool,
    read_metrics,
    train,
    weights,
)

from data_prep.train_tokenizer import cut_sentences, save_tokenizer, train_tokenizer
from minimind.checkpoints.consolidate import TrainingCheckpoint
from minimind.checkpoints.folder import list_checkpoints, verify_checkpoint
from minimind.checkpoints.formats.load_model import load_model
from minimind.checkpoints.loading import engine_probe_loss, find_differences, load_checkpoint
from minimind.checkpoints.manifest import CheckpointError, FileRecord, read_manifest
from minimind.checkpoints.probe import probe_batch
from minimind.checkpoints.reshard import part_of
from minimind.checkpoints.safe_load import read_states
from minimind.data.loader import Batch, BatchLoader
from minimind.errors import EXIT_STOPPED, UserError
from minimind.files import hash_file

ONE_CYCLE = {"cycle_min_lr": 1e-3, "cycle_max_lr": 1e-2, "cycle_first_step_size": 4}


@pytest.fixture(scope="module")
def pool():
    yield from rank_pool(2)


@pytest.fixture(scope="module")
def pool_of_three():
    yield from rank_pool(3)


def cut_back(run_dir: Path, steps: int) -> None:
    """Leave a run as if it had been killed after it saved at `steps`: its metrics go on, its checkpoints do not."""
    for folder in list_checkpoints(run_dir)[steps // 2 :]:
        shutil.rmtree(folder)


def assert_same_run(a: Path, b: Path) -> None:
    assert losses(a) == losses(b)
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_one_rank_continues_bit_for_bit(tiny_corpus, tmp_path, stage, precision):
    settings = {"stage": stage, "precision": precision, "dropout": 0.1, "eval_every": 2}
    train(flags_for(tiny_corpus, tmp_path / "whole", **settings, async_save=False))
    train(flags_for(tiny_corpus, tmp_path / "cut", **settings))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    cut_back(tmp_path / "cut", 2)
    code, printed = train(flags_for(tiny_corpus, tmp_path / "cut", **settings))
    assert code == 0 and "at step 2" in printed and "their order begins" not in printed
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    # Evaluations stand once too.
    evaluated = [record["step"] for record in read_metrics(tmp_path / "cut") if "eval_loss" in record]
    assert evaluated == [2, 4, 6]


EP_2 = {**EXPERTS, "ep_size": 2}
# Enough heads for two ranks to share.
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
TP_2 = {**HEADS, "attention_bias": True, "attention_dropout": 0.1, "tp_size": 2}


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        *((stage, settings) for settings in ({}, EP_2, TP_2) for stage in range(4)),
        *((stage, {**EP_2, **TP_2}) for stage in (0, 1, 3)),
        (1, {**TP_2, "precision": "bf16", "activation_checkpointing": True}),
        (2, {"optimizer": "muon", "tie_word_embeddings": False}),
        (3, {**EP_2, "optimizer": "muon"}),
        (1, {**EP_2, "precision": "bf16"}),
        *((stage, {"sp_size": 2, "document_mask": True}) for stage in (1, 3)),
        (3, {**EXPERTS, "precision": "bf16"}),
        # Noise and chance in the routing come again too.
        *((stage, {**NATIVE, "ep_size": 2, "moe_gate_noise": "jitter"}) for stage in (0, 2)),
    ],
)
def test_two_ranks_continue_bit_for_bit(tiny_corpus, tmp_path, pool: RankPool, stage, settings):
    settings = {"stage": stage, "dropout": 0.1, **settings}
    pool.run(train, flags_for(tiny_corpus, tmp_path / "whole", **settings))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    cut_back(tmp_path / "cut", 4)
    pool.run(train, flags_for(tiny_corpus, tmp_path / "cut", **settings))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def load_comparing(engine, resolved, folder: Path, manifest, **options):
    """Load, and compare every bit of the weights and moments with the files."""
    state = load_checkpoint(engine, resolved, folder, manifest, **options)
    source = TrainingCheckpoint(folder, manifest)
    differing = find_differences(engine, resolved, source)
    for name, parameter in engine.module.named_parameters():
        part = part_of(name, resolved)
        for key in source.keys_of(part.name)[1:]:
            held = safe_get_full_optimizer_state(parameter, key)  # None at stage 0
            held = engine.optimizer.state[parameter][key] if held is None else held
            if not torch.equal(held.reshape(-1), source.read(part.name, key)[part.index].reshape(-1)):
                differing.append(f"{name} {key}")
    assert differing == []
    return state


def train_hashing(flags: list[str], folder: Path) -> tuple[int, str]:
    """Train, and write down for every step what this rank took of it; what is loaded must be what was saved."""
    take = BatchLoader.step_batches

    def step_batches(loader: BatchLoader, step: int) -> list[Batch]:
        batches = take(loader, step)
        (folder / f"step{step}_rank{loader.dp_rank}").write_text(str(hash_stream(batches)))
        return batches

    with (
        unittest.mock.patch.object(BatchLoader, "step_batches", step_batches),
        unittest.mock.patch("minimind.training.setup.load_checkpoint", load_comparing),
    ):
        return train(flags)


def batch_hashes(folder: Path) -> dict[int, int]:
    """The hash of each step's samples; it does not depend on how the ranks shared them."""
    sums: collections.Counter[int] = collections.Counter()
    for path in folder.iterdir():
        sums[int(path.name.partition("_")[0].removeprefix("step"))] += int(path.read_text())
    return {step: value % 2**64 for step, value in sums.items()}


def walk(corpus, folder, starts, run_ranks, *, whole_rows=True, **common):
    """One run that is stopped after each step and continued as `starts` says; another that is not, on one rank.

    Args:
        whole_rows: no ranks share rows, so that each row has its hash.
    """
    for name in ("whole", "run"):
        (folder / f"{name}-hashes").mkdir(parents=True)
    whole, run = folder / "whole", folder / "run"
    run.mkdir()
    common |= {"steps": len(starts), "save_every": 100}
    train_hashing(flags_for(corpus, whole, **common), folder / "whole-hashes")
    for number, (world_size, settings) in enumerate(starts):
        (run / "STOP").touch()  # stops each of them after one step
        flags = flags_for(corpus, run, **{**common, **settings})
        for code, _ in run_ranks[world_size](train_hashing, flags, folder / "run-hashes"):
            assert code == (0 if number == len(starts) - 1 else EXIT_STOPPED)
    assert not whole_rows or batch_hashes(folder / "run-hashes") == batch_hashes(folder / "whole-hashes")
    expected, found = losses(whole), losses(run)
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=1e-5)
    for (name, key), tensor in optimizer_state(whole).items():
        torch.testing.assert_close(optimizer_state(run)[name, key], tensor, rtol=1e-3, atol=2e-5)


def optimizer_state(run_dir: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Weights and moments of the newest checkpoint, and its buffers."""
    source = TrainingCheckpoint(list_checkpoints(run_dir)[-1])
    state = {(name, key): source.read(name, key).clone() for name in source.shapes for key in source.keys_of(name)}
    return state | {(name, "buffer"): tensor for name, tensor in source.buffers().items()}


@pytest.fixture(scope="module")
def run_ranks(pool, pool_of_three):
    return {1: lambda work, *args: [work(*args)], 2: pool.run, 3: pool_of_three.run}


def test_any_world_size_and_stage_continue_one_run(tiny_corpus, tmp_path, run_ranks):
    # Every change of stage once, and the ranks 1 -> 2 -> 3 -> 1.
    stages = (1, 3, 2, 0, 3, 0, 1, 2, 3, 1, 0, 2, 1)
    ranks = (1, 2, 3, 1, 3, 2, 3, 1, 2, 3, 1, 2, 1)
    starts = [(world_size, {"stage": stage}) for world_size, stage in zip(ranks, stages, strict=True)]
    walk(tiny_corpus, tmp_path, starts, run_ranks, global_batch_size=6)


def test_any_ep_size_continues_one_run(tiny_corpus, tmp_path, run_ranks):
    # (ranks, ep size, stage): the ep sizes 1 -> 2 -> 1 under every stage, and every way into ep size 2.
    cells = (
        (1, 1, 1), (2, 2, 1), (1, 1, 3), (2, 2, 3), (2, 1, 3), (2, 2, 2), (1, 1, 2), (2, 2, 0), (1, 1, 0), (2, 2, 3),
        (2, 1, 1),
    )  # fmt: skip
    starts = [(world_size, {"ep_size": ep_size, "stage": stage}) for world_size, ep_size, stage in cells]
    walk(tiny_corpus, tmp_path, starts, run_ranks, **EXPERTS)


def test_any_tp_size_continues_one_run(tiny_corpus, tmp_path, run_ranks):
    # (ranks, tp size, stage): from layers that two ranks share to one rank and to two with other samples, and back.
    cells = (
        (1, 1, 1), (2, 2, 1), (1, 1, 3), (2, 2, 3), (2, 1, 2), (2, 2, 2), (2, 1, 0), (2, 2, 0), (1, 1, 0), (2, 2, 3),
        (2, 2, 0), (2, 2, 1),
    )  # fmt: skip
    starts = [(world_size, {"tp_size": tp_size, "stage": stage}) for world_size, tp_size, stage in cells]
    walk(tiny_corpus, tmp_path / "dense", starts, run_ranks, **HEADS, attention_bias=True)
    cells = ((2, 2, 1), (1, 1, 0), (2, 2, 3), (2, 1, 2), (2, 2, 0), (2, 2, 2))
    starts = [(n, {"tp_size": size, "stage": stage, "ep_size": n}) for n, size, stage in cells]
    walk(tiny_corpus, tmp_path / "experts", starts, run_ranks, **EXPERTS, **HEADS)


@pytest.mark.parametrize("model", [{}, {**EXPERTS, "ep_size": 1}], ids=["dense", "experts"])
def test_any_sharing_of_sequences_continues_one_run(tiny_corpus, tmp_path, run_ranks, model):
    # (ranks, sp size, stage): sequences shared and not, under every stage, and every change between them.
    cells = ((1, 1, 1), (2, 2, 3), (2, 1, 2), (2, 2, 0), (1, 1, 3), (2, 2, 1), (2, 1, 3), (2, 2, 2), (1, 1, 0))
    starts = [(world_size, {"sp_size": sp_size, "stage": stage}) for world_size, sp_size, stage in cells]
    walk(tiny_corpus, tmp_path, starts, run_ranks, whole_rows=False, document_mask=True, **model)


def test_any_backend_of_the_experts_continues_one_run(tiny_corpus, tmp_path, run_ranks):
    cells = (
        (1, 1, 1, "autoep"), (2, 2, 0, "deepspeed"), (2, 2, 3, "autoep"), (1, 1, 2, "deepspeed"),
        (2, 2, 1, "deepspeed"), (2, 1, 0, "deepspeed"), (2, 2, 2, "deepspeed"), (1, 1, 1, "autoep"),
    )  # fmt: skip
    starts = [
        (world_size, {"ep_size": ep_size, "stage": stage, "moe_backend": backend})
        for world_size, ep_size, stage, backend in cells
    ]
    walk(tiny_corpus, tmp_path, starts, run_ranks, **{**NATIVE, "moe_backend": "autoep"})


def test_another_precision_continues_through_float32(tiny_corpus, tmp_path):
    run = tmp_path / "run"
    train(flags_for(tiny_corpus, tmp_path / "whole"))
    train(flags_for(tiny_corpus, run))
    cut_back(run, 2)
    code, printed = train(flags_for(tiny_corpus, run, precision="bf16", stage=2))
    assert code == 0 and "its part of the files" in printed
    expected, found = losses(tmp_path / "whole"), losses(run)
    assert all(found[step] == pytest.approx(expected[step], rel=2e-2) for step in expected)


def train_and_see_logits(flags: list[str]) -> torch.Tensor:
    """The logits (B, T, vocab_size) of the probe batch, from the engine at the end of a run."""
    seen = []

    def probe(engine, resolved):
        engine.eval()
        inputs, _ = probe_batch(MODEL["vocab_size"], MODEL["max_position_embeddings"])
        with torch.no_grad():
            seen.append(engine(inputs).logits)
        return engine_probe_loss(engine, resolved)

    with unittest.mock.patch("minimind.training.trainer.engine_probe_loss", probe):
        train(flags)
    return seen[-1]


@pytest.mark.parametrize(
    ("stage", "settings"),
    [(stage, settings) for settings in ({}, {**EXPERTS, "ep_size": 1}, EP_2, TP_2) for stage in range(4)]
    + [(stage, {**EP_2, **TP_2}) for stage in (0, 3)]
    + [(stage, {**NATIVE, "ep_size": ep_size}) for ep_size in (1, 2) for stage in range(3)],
)
def test_a_checkpoint_of_two_ranks_is_one_model(tiny_corpus, tmp_path, pool: RankPool, stage, settings):
    flags = flags_for(tiny_corpus, tmp_path, stage=stage, eval_every=6, save_every=6, **settings)
    logits = pool.run(train_and_see_logits, flags)[0]
    model, tokenizer_file = load_model(tmp_path)  # proves itself by the probe
    assert tokenizer_file.parent == tmp_path
    inputs, _ = probe_batch(MODEL["vocab_size"], MODEL["max_position_embeddings"])
    with torch.no_grad():
        torch.testing.assert_close(model(inputs).logits, logits, rtol=0, atol=1e-6)
    manifest = read_manifest(list_checkpoints(tmp_path)[-1])
    assert manifest.world_size == 2 and manifest.ep_size == settings.get("ep_size", 1)
    assert manifest.eval_loss == [r["eval_loss"] for r in read_metrics(tmp_path) if "eval_loss" in r][-1]
    source = TrainingCheckpoint(list_checkpoints(tmp_path)[-1])
    assert source.keys == ("fp32", "exp_avg", "exp_avg_sq") and source.optimizer.scalars == {"step": 6}
    assert dict(model.named_parameters()).keys() == source.shapes.keys()


def test_muon_continues_on_other_ranks_and_another_stage(tiny_corpus, tmp_path, run_ranks):
    cells = ((1, 2), (2, 3), (1, 3), (2, 1), (2, 0), (2, 2), (1, 1))
    starts = [(world_size, {"stage": stage}) for world_size, stage in cells]
    walk(tiny_corpus, tmp_path, starts, run_ranks, optimizer="muon")


def test_a_run_keeps_the_optimizer_that_it_began_with(tiny_corpus, tmp_path):
    """Also one of the time when that was the default, and one that began by DeepSpeed's JSON."""
    for name, begun in (("adamw", {}), ("muon", {"ds_config": ROOT / "ds_configs" / "zero2_muon.json"})):
        flags = flags_for(tiny_corpus, tmp_path / name, **begun)
        unsaid = [flag for flag in flags if flag not in ("--optimizer", "adamw")]
        train(flags)
        cut_back(tmp_path / name, 4)
        code, printed = train(unsaid)
        assert code == 0 and f"optimizer {name}, peak rate" in printed and "at step 4" in printed
    other = "optimizer muon there, adamw here"
    with pytest.raises(UserError, match=other):
        train([*(flags_for(tiny_corpus, tmp_path / "muon", stage=2)), "--optimizer", "adamw"])


def test_the_folder_says_what_is_wrong_before_training(tiny_corpus, tmp_path):
    flags = flags_for(tiny_corpus, tmp_path / "run")
    train(flags)
    with pytest.raises(UserError, match="already holds step_00000006"):
        train([*flags, "--resume", "never"])
    newest = list_checkpoints(tmp_path / "run")[-1]
    states = newest / "mp_rank_00_model_states.pt"
    states.write_bytes(states.read_bytes()[:-1])
    code, printed = train([*flags, "--steps", "7"])
    assert code == 0 and "skipped" in printed and "bytes instead of" in printed and "at step 4" in printed
    for folder in list_checkpoints(tmp_path / "run"):
        (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="none is valid"):
        train(flags)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"hidden_size": 32}, "hidden_size 16 there, 32 here"), ({"seq_len": 8}, "seq_len"), ({"seed": 1}, "seed")],
)
def test_another_run_is_refused_with_its_differences(tiny_corpus, tmp_path, change, word):
    train(flags_for(tiny_corpus, tmp_path, steps=2))
    with pytest.raises(UserError, match=word):
        train(flags_for(tiny_corpus, tmp_path, **change))


def test_other_settings_may_change_and_are_named(tiny_corpus, tmp_path):
    train(flags_for(tiny_corpus, tmp_path, lr=1e-3, weight_decay=0.1))
    cut_back(tmp_path, 2)
    flags = flags_for(tiny_corpus, tmp_path, lr=2e-3, weight_decay=0.0)
    code, printed = train(flags)
    assert code == 0 and "lr is 0.002 from here on; it was 0.001" in printed and "weight_decay is 0.0" in printed
    path = list_checkpoints(tmp_path)[-1] / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    groups = read_states(path)["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0}


def test_other_shards_only_on_purpose(tiny_corpus, tmp_path):
    other = write_corpus(tmp_path / "other", tokens=5000, seed=5)
    train(flags_for(tiny_corpus, tmp_path / "run", steps=2))
    with pytest.raises(UserError, match="--allow-data-change"):
        train(flags_for(other, tmp_path / "run"))
    code, printed = train(flags_for(other, tmp_path / "run", allow_data_change=True))
    assert code == 0 and "at step 2" in printed and "their order begins at step 2" in printed
    assert read_manifest(list_checkpoints(tmp_path / "run")[-1]).data_start_step == 2


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Callable[..., tuple[str, ...]]:
    """Flags of a mixture of three small corpora with these weights."""
    folder = tmp_path_factory.mktemp("mixture")
    for number, name in enumerate(("web", "code", "zh")):
        write_corpus(folder / name, tokens=3000 // (number + 1), seed=number)
    return lambda **weights: tuple(f"{name}={folder / name}:{weight}" for name, weight in weights.items())


def test_a_mixture_is_one_stream_on_any_number_of_ranks(mixture, tmp_path, run_ranks):
    schedule = tmp_path / "schedule.json"
    schedule.write_text('[{"step": 3, "weights": {"code": 1, "zh": 1}}]')
    starts = [(1, {}), (2, {}), (3, {}), (1, {}), (3, {}), (2, {})]
    common = {"global_batch_size": 6, "mixture_schedule": schedule}
    walk(mixture(web=6, code=3, zh=1), tmp_path, starts, run_ranks, **common)
    by_source = [
        [
            (record["source_tokens"], record["source_loss"].keys())
            for record in read_metrics(tmp_path / name)
            if "loss" in record
        ]
        for name in ("whole", "run")
    ]
    assert by_source[0] == by_source[1] and by_source[0][2][0] == {"web": 176, "code": 96, "zh": 16}


def test_a_mixture_changes_its_weights_only_on_purpose_and_exactly(mixture, tmp_path):
    """A run whose weights change at a resume takes the windows of one that had the change in its schedule."""
    (tmp_path / "schedule.json").write_text('[{"step": 3, "weights": {"web": 1, "zh": 3}}]')
    before, after = mixture(web=6, code=3, zh=1), mixture(web=1, zh=3)
    planned = flags_for(before, tmp_path / "planned", mixture_schedule=tmp_path / "schedule.json", save_every=3)
    assert train(planned)[0] == 0
    run = tmp_path / "run"
    train(flags_for(before, run, steps=3, warmup_steps=2, schedule="constant"))
    with pytest.raises(UserError, match="--allow-data-change"):
        train(flags_for(after, run, schedule="constant"))
    code, printed = train(flags_for(after, run, schedule="constant", allow_data_change=True))
    assert code == 0 and "mixture" in printed and "their order begins at step 3" in printed
    read = [
        [r["source_tokens"] for r in read_metrics(tmp_path / name) if "loss" in r][-1] for name in ("planned", "run")
    ]
    assert {name: read[0][name] for name in ("web", "zh")} == read[1]
    # And again, which needs no word now; the stream is that of the change.
    shutil.rmtree(list_checkpoints(run)[-1])
    expected = losses(run)
    assert train(flags_for(after, run, schedule="constant"))[0] == 0 and losses(run) == expected
    taken = [read_manifest(list_checkpoints(tmp_path / name)[-1]).windows_taken for name in ("planned", "run")]
    assert dict(taken[0]) == dict(taken[1])


def test_a_run_goes_on_with_the_part_of_a_grown_corpus_that_it_began_with(tmp_path, monkeypatch):
    save_tokenizer(train_tokenizer(list(cut_sentences(make_texts(100))), 320), tmp_path / "tokenizer")
    prepare = Prepare(tmp_path / "tokenizer", monkeypatch)
    old, new = (write_jsonl(tmp_path / f"{seed}.jsonl", make_texts(60, seed)) for seed in (0, 1))
    prepare(tmp_path / "corpus", old)

    def flags(name, **others):
        return flags_for(tmp_path / "corpus", tmp_path / name, **{"vocab_size": 320, **others})

    train(flags("whole"))
    train(flags("run", steps=2))
    train(flags("wants", steps=2))
    prepare(tmp_path / "corpus", new, append=True)
    code, printed = train(flags("run"))
    assert code == 0 and "has grown: the run goes on with the shards it began with" in printed
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    last = [[r["eval_loss"] for r in read_metrics(tmp_path / run) if "eval_loss" in r][-1] for run in ("run", "whole")]
    assert last[0] == last[1]
    # A new run takes all, or leaves the new part out; one that goes on may want it.
    train(flags("old", corpus_parts=1))
    train(flags("all"))
    assert losses(tmp_path / "old") == losses(tmp_path / "whole") != losses(tmp_path / "all")
    code, printed = train(flags("wants", allow_data_change=True))
    assert code == 0 and "their order begins at step 2" in printed
    assert losses(tmp_path / "wants")[3] != losses(tmp_path / "whole")[3]


def test_a_hostile_file_does_not_run(tiny_corpus, tmp_path):
    marker = tmp_path / "it ran"

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch '{marker}'",)

    flags = flags_for(tiny_corpus, tmp_path / "run")
    train(flags)
    newest = list_checkpoints(tmp_path / "run")[-1]
    path = newest / "mp_rank_00_model_states.pt"
    states = torch.load(path, weights_only=False)
    torch.save({**states, "payload": Hostile()}, path)
    # Its author gave it a manifest that fits.
    manifest = read_manifest(newest)
    records = [FileRecord(r.path, (newest / r.path).stat().st_size, hash_file(newest / r.path)) for r in manifest.files]
    (newest / "manifest.json").write_text(dataclasses.replace(manifest, files=tuple(records)).to_json())
    verify_checkpoint(newest)
    for load in (lambda: train([*flags, "--steps", "8"]), lambda: load_model(tmp_path / "run")):
        with pytest.raises(CheckpointError, match="only tensors and plain values are safe"):
            load()
    assert not marker.exists()


def wait_for_step(run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        path = run_dir / "metrics.jsonl"
        if path.exists() and any(json.loads(line)["step"] >= step for line in path.read_text().splitlines()):
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} did not come")


@pytest.mark.parametrize(
    ("number", "ranks"),
    [(signal.SIGTERM, [0, 1]), (signal.SIGUSR1, [1]), (signal.SIGINT, [0]), (signal.SIGHUP, [1])],
)
def test_a_signal_at_any_rank_saves_and_stops_all(tiny_corpus, tmp_path, pool: RankPool, number, ranks):
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored here, as under nohup")
    flags = flags_for(tiny_corpus, tmp_path, steps=100_000, save_every=0)
    pool.start(train, flags)
    wait_for_step(tmp_path, 3)
    for rank in ranks:
        os.kill(pool.pids[rank], number)
    for kind, value in pool.finish():
        assert kind == "done" and value[0] == EXIT_STOPPED
    last = max(losses(tmp_path))
    assert verify_checkpoint(list_checkpoints(tmp_path)[-1]).step == last
    (tmp_path / "STOP").touch()
    code, printed = pool.run(train, flags)[0]
    assert code == EXIT_STOPPED and f"at step {last}" in printed and max(losses(tmp_path)) == last + 1


def test_a_file_asks_for_a_save(tiny_corpus, tmp_path):
    tmp_path.joinpath("SAVE").touch()
    code, _ = train(flags_for(tiny_corpus, tmp_path, save_every=0, steps=3))
    assert code == 0 and [verify_checkpoint(folder).step for folder in list_checkpoints(tmp_path)] == [1, 3]
    assert not (tmp_path / "SAVE").exists()


@pytest.mark.parametrize(
    ("section", "stages"),
    [
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 5}}}, (0, 1)),
        ({"scheduler": {"type": "OneCycle", "params": ONE_CYCLE}}, (1, 1)),
        ({"scheduler": {"type": "OneCycle", "params": ONE_CYCLE}}, (1, 0)),
        ({"optimizer": {"type": "NAdam", "params": {"lr": 1e-2}}, "zero_allow_untested_optimizer": True}, (1, 2)),
    ],
)
def test_what_the_json_schedules_and_counts_goes_on(tiny_corpus, tmp_path, section, stages):
    def run(name: str, stage: int, steps: int) -> Path:
        ds = {**json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text()), **section}
        (tmp_path / "ds.json").write_text(json.dumps(ds))
        flags = flags_for(tiny_corpus, tmp_path / name, steps=steps, save_every=3, ds_config=tmp_path / "ds.json")
        if "scheduler" in section:
            place = flags.index("--warmup-steps")
            del flags[place : place + 2]
        else:
            flags += ["--schedule", "constant"]
        assert train(flags)[0] == 0
        return tmp_path / name

    whole = run("whole", stages[1], 6)
    run("part", stages[0], 3)
    part = run("part", stages[1], 6)
    rates = [[record["lr"] for record in read_metrics(path) if "loss" in record] for path in (whole, part)]
    assert rates[0] == rates[1]
    exact = stages[0] == stages[1]
    assert losses(part) == (losses(whole) if exact else pytest.approx(losses(whole), rel=1e-5))
