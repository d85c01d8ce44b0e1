"""The command that trains, in this process (one rank) and as a program: what it refuses, records, and repeats."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytest import approx
from structured_corpus import write_corpus
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import ROOT, flags_for, losses, read_metrics, train

import minimind.evaluate
import minimind.plan
import minimind.train
from minimind.checkpoints.folder import list_checkpoints
from minimind.checkpoints.formats.load_model import load_model
from minimind.data.dataset import TokenDataset
from minimind.data.loader import BatchLoader
from minimind.data.shards import open_split
from minimind.errors import UserError, run_main
from minimind.model import MiniMindForCausalLM, ModelConfig
from minimind.reports.run.charts import draw_chart, list_charts, to_svg
from minimind.reports.run.data import read_run
from minimind.reports.status import read_status, status_table
from minimind.training.trainer import BadStepError

# One start of this command line, on float32 on a CPU. Rounding differs a little from one machine to another.
GOLDEN = [5.546631, 5.543338, 5.544599, 5.499214, 5.510201, 5.480062, 5.479853, 5.420134, 5.407680, 5.381625]
SETTINGS: dict[str, Any] = {"steps": 10, "lr": 5e-3, "hidden_size": 32, "num_hidden_layers": 2, "save_every": 0}


def flags(corpus: Path, run_dir: Path, **others: Any) -> list[str]:
    return flags_for(corpus, run_dir, **{**SETTINGS, **others})


@pytest.fixture(scope="module")
def plain(tiny_corpus, tmp_path_factory) -> Path:
    """A run of ten steps with an evaluation every fourth."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    code, _ = train(flags(tiny_corpus, run_dir, eval_every=4, tensorboard=True))
    assert code == 0
    return run_dir


# What a run records.


def test_the_golden_losses(plain):
    assert list(losses(plain)) == list(range(1, 11))
    assert list(losses(plain).values()) == approx(GOLDEN, rel=1e-4)


def test_every_step_has_every_figure(plain):
    steps = [record for record in read_metrics(plain) if "loss" in record]
    for record in steps:
        step = record["step"]
        assert (record["consumed_samples"], record["tokens_seen"]) == (4 * step, 4 * 16 * step)
        assert record["lr"] == approx(2.5e-3 * step if step <= 2 else record["lr"])
        for name in ("grad_norm", "step_seconds", "tokens_per_second", "mfu", "peak_memory_bytes"):
            assert record[name] > 0 and math.isfinite(record[name])
        assert record["tokens_per_second"] == approx(64 / record["step_seconds"])
    rates = [record["lr"] for record in steps]
    assert rates[2] == 5e-3 and rates[2:] == sorted(rates[2:], reverse=True) and rates[-1] < 1e-3
    evaluations = [record for record in read_metrics(plain) if "eval_loss" in record]
    assert [record["step"] for record in evaluations] == [4, 8, 10]


def test_the_run_folder_holds_what_it_promises(plain):
    names = {path.name for path in plain.iterdir()}
    assert {"run_config.json", "ds_config.json", "metrics.jsonl", "tensorboard", "checkpoints"} <= names
    assert any((plain / "tensorboard").iterdir())
    run, ds = (json.loads((plain / name).read_text()) for name in ("run_config.json", "ds_config.json"))
    assert run["train"]["warmup_steps"] == 2 and run["train"]["optimizer"] == "adamw"
    assert "auto" not in json.dumps(ds) and ds["train_batch_size"] == 4
    assert [path.name for path in list_checkpoints(plain)] == ["step_00000010"]


def test_the_evaluation_is_the_mean_over_every_target_of_the_validation_split(plain, tiny_corpus):
    """Against the final weights, computed here window by window."""
    model, _ = load_model(plain)
    reader = open_split(tiny_corpus, "val")
    dataset = TokenDataset(reader, 16, keep_tail=True)
    total, targets = 0.0, 0
    with torch.no_grad():
        for i in range(len(dataset)):
            ids, labels = (torch.from_numpy(part)[None] for part in (dataset[i].input_ids, dataset[i].labels))
            total += torch.nn.functional.cross_entropy(model(ids).logits[0], labels[0], reduction="sum").item()
            targets += int((labels != -100).sum())
    last = [record for record in read_metrics(plain) if "eval_loss" in record][-1]
    assert last["eval_targets"] == targets == reader.num_tokens - 1
    assert last["eval_loss"] == approx(total / targets, rel=1e-5)
    tokens_per_byte = reader.manifest.total_tokens / reader.manifest.total_bytes
    assert last["eval_bits_per_byte"] == approx(last["eval_loss"] / math.log(2) * tokens_per_byte)
    assert last["eval_perplexity"] == approx(math.exp(last["eval_loss"]))


# Other ways to the same losses.


@pytest.mark.parametrize(
    "others",
    [
        {"activation_checkpointing": True, "stage": 3, "flash_attn": False},
        {"num_workers": 2, "log_every": 3, "eval_every": 5, "stage": 0},
        {"micro_batch_size": 4, "stage": 2},
    ],
    ids=["checkpointed", "read ahead and logged seldom", "without accumulation"],
)
def test_these_change_no_loss(plain, tiny_corpus, tmp_path, others):
    train(flags(tiny_corpus, tmp_path, **others))
    assert list(losses(tmp_path)) == list(range(1, 11)), "a step is missing from metrics.jsonl"
    assert list(losses(tmp_path).values()) == approx(list(losses(plain).values()), rel=1e-5)


def test_bf16_follows(plain, tiny_corpus, tmp_path):
    train(flags(tiny_corpus, tmp_path, precision="bf16", steps=5))
    assert list(losses(tmp_path).values()) != GOLDEN[:5]
    assert list(losses(tmp_path).values()) == approx(GOLDEN[:5], rel=2e-2)


def test_another_seed_is_another_run(tiny_corpus, tmp_path):
    train(flags(tiny_corpus, tmp_path, steps=2, seed=7))
    assert losses(tmp_path)[1] != approx(GOLDEN[0], rel=1e-5)


@pytest.mark.parametrize("document_mask", [False, True])
def test_loss_and_gradient_are_divided_by_the_targets_of_the_whole_step(tiny_corpus, tmp_path, document_mask):
    """Four micro-batches, with a mask of unequal numbers of targets, against one plain mean."""
    train(flags(tiny_corpus, tmp_path, document_mask=document_mask, steps=3))
    run = json.loads((tmp_path / "run_config.json").read_text())
    torch.manual_seed(run["train"]["seed"])
    model = MiniMindForCausalLM(ModelConfig.from_dict(run["model"]))
    dataset = TokenDataset(open_split(tiny_corpus, "train"), 16, document_mask)
    batches = BatchLoader(dataset, run["train"]["seed"], 1, 4).step_batches(0)
    assert len(batches) == 4
    counts = [batch.num_targets for batch in batches]
    assert (len(set(counts)) > 1) == document_mask, "the micro-batches weigh alike, and nothing is tested"
    summed = sum(
        model(b.input_ids, b.labels, position_ids=b.position_ids, cu_seqlens=b.cu_seqlens, loss_reduction="sum").loss
        for b in batches
    )
    mean = summed / sum(counts)
    mean.backward()
    norm = torch.linalg.vector_norm(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    first = read_metrics(tmp_path)[0]
    assert first["loss"] == approx(mean.item(), rel=1e-5)
    assert first["grad_norm"] == approx(norm.item(), rel=1e-4)


def test_steps_follow_from_epochs(tiny_corpus, tmp_path, capsys):
    args = [flag for flag in flags(tiny_corpus, tmp_path, epochs=0.5, warmup_steps=0) if flag not in ("--steps", "10")]
    minimind.train.main([*args, "--dry-run"])
    samples = len(TokenDataset(open_split(tiny_corpus, "train"), 16))
    assert f"length    {int(0.5 * samples / 4)} steps, 0.50 epochs" in capsys.readouterr().out


def test_a_scheduler_of_deepspeed_drives_the_rate(tiny_corpus, tmp_path):
    params = {"warmup_min_lr": 0, "warmup_max_lr": 0.004, "warmup_num_steps": 4, "warmup_type": "linear"}
    ds = {"zero_optimization": {"stage": 1}, "scheduler": {"type": "WarmupLR", "params": params}}
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    args = flags(tiny_corpus, tmp_path / "run", ds_config=tmp_path / "ds.json", steps=6)
    at = args.index("--warmup-steps")
    train(args[:at] + args[at + 2 :])
    rates = [record["lr"] for record in read_metrics(tmp_path / "run") if "lr" in record]
    assert json.loads((tmp_path / "run" / "run_config.json").read_text())["train"]["warmup_steps"] is None
    assert rates == approx([0.0, 0.0, 0.001, 0.002, 0.003, 0.004])  # DeepSpeed takes its first rate twice


# Steps that go wrong.


class Spoil(torch.autograd.Function):
    """The loss itself, with a NaN gradient."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * float("nan")


@pytest.fixture
def spoil_steps(monkeypatch):
    """Spoil the last micro-batch of the given steps of the next run, of four micro-batches each."""

    def prepare(*steps: int, gradient_alone: bool = False) -> None:
        forward, calls = MiniMindForCausalLM.forward, [0]

        def spoilt(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            if self.training and output.loss is not None:
                calls[0] += 1
                if calls[0] % 4 == 0 and calls[0] // 4 in steps:
                    loss = Spoil.apply(output.loss) if gradient_alone else output.loss * float("nan")
                    return output._replace(loss=loss)
            return output

        monkeypatch.setattr(MiniMindForCausalLM, "forward", spoilt)

    yield prepare


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("gradient_alone", [False, True])
def test_a_bad_step_stops_the_run_and_is_saved_nowhere(
    plain, tiny_corpus, tmp_path, spoil_steps, stage, gradient_alone
):
    args = flags(tiny_corpus, tmp_path, save_every=2, stage=stage)
    with pytest.MonkeyPatch.context() as patch:
        spoil_steps(5, gradient_alone=gradient_alone)
        with pytest.raises(BadStepError) as error:
            train(args)
        patch.undo()
    words = str(error.value)
    assert words.startswith("step 5: gradient norm is " if gradient_alone else "step 5: loss is nan on rank 0;")
    assert "last good checkpoint" in words and "step_00000004" in words and "\n" not in words
    assert list(losses(tmp_path)) == [1, 2, 3, 4]
    assert list_checkpoints(tmp_path)[-1].name == "step_00000004"


def test_after_a_bad_step_the_same_command_goes_on(plain, tiny_corpus, tmp_path, monkeypatch, spoil_steps):
    args = flags(tiny_corpus, tmp_path, save_every=4)
    spoil_steps(6)
    with pytest.raises(BadStepError):
        train(args)
    monkeypatch.undo()
    code, printed = train(args)
    assert code == 0 and "step_00000004" in printed
    assert list(losses(tmp_path).values()) == approx(list(losses(plain).values()), rel=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_bounded_number_of_bad_steps_is_skipped(tiny_corpus, tmp_path, spoil_steps, stage):
    spoil_steps(3, 5)
    args = flags(tiny_corpus, tmp_path, skip_bad_steps=2, steps=7, stage=stage, log_every=4)
    code, printed = train(args)
    assert code == 0
    assert "step 3: loss is nan on rank 0; weights left as they were (1 of 2 allowed)" in printed
    found = losses(tmp_path)
    assert [step for step, loss in found.items() if loss == "nan"] == [3, 5] and len(found) == 7
    assert all(float(found[step]) < 5.6 for step in (1, 2, 4, 6, 7))
    assert [record for record in read_metrics(tmp_path) if "eval_loss" in record][-1]["eval_loss"] < 5.6


def test_one_bad_step_more_than_allowed_stops(tiny_corpus, tmp_path, spoil_steps):
    spoil_steps(2, 3)
    with pytest.raises(BadStepError, match=r"step 3: loss is nan on rank 0; .* last good checkpoint: none was saved"):
        train(flags(tiny_corpus, tmp_path, skip_bad_steps=1))
    assert list_checkpoints(tmp_path) == []


# Mixtures.


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> dict[str, Path]:
    """Corpora of 4,000, 400 and 1,000 training tokens; the second has nothing to evaluate."""
    folder = tmp_path_factory.mktemp("three")
    sizes = {"web": (4000, 100), "code": (400, 0), "zh": (1000, 60)}
    return {
        name: write_corpus(folder / name, tokens=tokens, val_tokens=val_tokens, seed=number)
        for number, (name, (tokens, val_tokens)) in enumerate(sizes.items())
    }


def mixture_of(three: dict[str, Path], **suffixes: str) -> tuple[str, ...]:
    return tuple(f"{name}={three[name]}:{suffix}" for name, suffix in suffixes.items())


@pytest.fixture(scope="module")
def mixed(three, tmp_path_factory) -> tuple[Path, str]:
    """A run on a mixture whose shares change after step 4, and one source of which runs dry; what it printed."""
    run_dir = tmp_path_factory.mktemp("mixed") / "run"
    schedule = run_dir.parent / "schedule.json"
    schedule.write_text(json.dumps([{"step": 4, "weights": {"web": 1, "code": 2, "zh": 1}}]))
    shards = mixture_of(three, web="0.5", code="0.25:max-epochs=0.5", zh="0.25")
    code, printed = train(flags(shards, run_dir, mixture_schedule=schedule, tensorboard=True, micro_batch_size=2))
    assert code == 0
    return run_dir, printed


def test_a_mixture_says_before_it_starts_what_each_source_gives(mixed):
    lines = mixed[1].splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith("mixture")]
    cells = [line.split() for line in lines[at + 1 : at + 6]]
    assert [row[:2] for row in cells[:3]] == [["web", "50.00%"], ["code", "25.00%"], ["zh", "25.00%"]]
    # Of its 25 windows code may give 12: 4 of the first 16 places, and then every second one.
    assert "0.48 of 0.5" in lines[at + 2] and cells[1][3] == str(12 * 16)
    assert lines[at + 4].split("from ")[1] == "step 4: web 25.00%, code 50.00%, zh 25.00%"
    assert lines[at + 5].split("from ")[1] == "step 7: code has run dry: web 50.00%, zh 50.00%"


def test_the_losses_of_the_sources_make_up_the_loss(mixed):
    steps = [record for record in read_metrics(mixed[0]) if "loss" in record]
    before = dict.fromkeys(("web", "code", "zh"), 0)
    for record in steps:
        read = {name: tokens - before[name] for name, tokens in record["source_tokens"].items()}
        before = record["source_tokens"]
        assert sum(read.values()) == 4 * 16
        assert set(record["source_loss"]) == {name for name, tokens in read.items() if tokens}
        total = sum(loss * read[name] for name, loss in record["source_loss"].items())
        assert total / 64 == approx(record["loss"], rel=1e-5)
    assert steps[3]["source_tokens"] == {"web": 128, "code": 64, "zh": 64}
    assert steps[-1]["source_tokens"]["code"] == 12 * 16


def test_a_mixture_is_evaluated_by_source_and_as_a_whole(mixed, three, capsys):
    (record,) = [record for record in read_metrics(mixed[0]) if "eval_loss" in record]
    found = record["eval_source_loss"]
    assert list(found) == ["web", "zh"] and "web" in mixed[1].splitlines()[-2]
    assert record["eval_loss"] == approx((0.5 * found["web"] + 0.25 * found["zh"]) / 0.75, rel=1e-6)
    # The command measures the same, the folder alone too.
    common = ["--checkpoint", str(mixed[0]), "--seq-len", "16"]
    minimind.evaluate.main([*common, "--shards", *mixture_of(three, web="2", code="1", zh="1")])
    written = json.loads((mixed[0] / "evaluation.json").read_text())
    assert written["loss"] == approx(record["eval_loss"], rel=1e-5)
    assert "loss of zh" in capsys.readouterr().out
    minimind.evaluate.main([*common, "--shards", str(three["zh"])])
    alone = json.loads((mixed[0] / "evaluation.json").read_text())
    assert alone["loss"] == approx(found["zh"], rel=1e-5) == written["sources"]["zh"]["loss"]


def test_status_report_and_tensorboard_show_the_sources(mixed, tmp_path):
    events = EventAccumulator(str(mixed[0] / "tensorboard")).Reload()
    assert {"source_loss/web", "source_tokens/code", "eval_source_loss/zh"} <= set(events.Tags()["scalars"])
    (status,) = [read_status(mixed[0])]
    assert status.sources.startswith("web 5.") and "by source" in status_table([status])
    run = read_run(mixed[0], "run")
    charts = {chart.key: chart.curves for chart in list_charts([run])}
    assert charts["source_loss"] == ("source_loss/code", "source_loss/web", "source_loss/zh")
    assert run.curves["source_tokens/web"]["value"][3] == 128
    figure = draw_chart(next(chart for chart in list_charts([run]) if chart.key == "source_loss"), [run], "step")
    assert figure is not None and ">zh<" in to_svg(figure, "by-source").replace(" ", "")


def test_a_plan_says_what_each_source_gives(three, capsys):
    shards = mixture_of(three, web="0.5", code="0.25:max-epochs=0.5", zh="0.25")
    given = ["--model", "tiny", "--seq-len", "16", "--global-batch-size", "4", "--micro-batch-size", "4", "--shards"]
    minimind.plan.main([*given, *shards, "--steps", "10"])
    text = capsys.readouterr().out
    assert [line.split()[:2] for line in text.splitlines() if "%  " in line][-3:] == [
        ["web", "50.00%"],
        ["code", "25.00%"],
        ["zh", "25.00%"],
    ]
    with pytest.raises(UserError, match="every source runs dry after 3 of 10 steps"):
        limited = mixture_of(three, code="1:max-epochs=0.5")
        minimind.plan.main([*given, *limited, "--steps", "10"])


def test_a_source_that_disappears_is_one_line_and_no_step_is_lost(tmp_path, three):
    for name in ("web", "zh"):
        shutil.copytree(three[name], tmp_path / name)
    places = {name: tmp_path / name for name in ("web", "zh")}
    given = flags(mixture_of(places, web="1", zh="1"), tmp_path / "run")
    train(flags(mixture_of(places, web="1", zh="1"), tmp_path / "whole"))
    step_batches = BatchLoader.step_batches

    def losing(loader: BatchLoader, step: int):
        if step == 5:  # as another program deletes it; what is mapped already would stay
            (tmp_path / "zh").rename(tmp_path / "gone")
            for source in loader.dataset.sources:
                source.windows.reader._map_file.cache_clear()
        return step_batches(loader, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchLoader, "step_batches", losing)
        with pytest.raises(UserError) as failure:
            train(given)
    words = str(failure.value)
    assert f"{tmp_path / 'zh'}" in words and "is missing" in words and "the steps before are saved" in words
    assert "\n" not in words and list_checkpoints(tmp_path / "run")[-1].name == "step_00000005"
    (tmp_path / "gone").rename(tmp_path / "zh")
    code, printed = train(given)
    assert code == 0 and "at step 5" in printed and losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_what_cannot_be_mixed_is_one_line(three, tmp_path, no_group):
    shards = mixture_of(three, web="1", zh="1")
    for others, words in (
        ({"objective": "grpo", "reward": "length"}, "objective: grpo learns from questions in conversations"),
        ({"corpus_parts": 1}, "corpus_parts: 1 is of one corpus, not of a mixture"),
        ({"mixture_schedule": tmp_path / "none.json"}, "none.json: No such file or directory"),
    ):
        with pytest.raises(UserError, match=words):
            train(flags(shards, tmp_path / "run", **others))
    with pytest.raises(UserError, match=r"mixture_schedule: .* is for a mixture"):
        train(flags(three["web"], tmp_path / "run", mixture_schedule=tmp_path / "none.json"))


# What is refused, before a process group is made.


@pytest.fixture
def no_group(monkeypatch):
    def refuse(*_):
        raise AssertionError("a process group was made")

    monkeypatch.setattr(minimind.train, "process_group", refuse)


BAD = {
    "unknown flag": ({}, ["--learning-rat", "1"], "unknown flag --learning-rat"),
    "wrong value": ({}, ["--lr", "fast"], "--lr: 'fast' is not FLOAT"),
    "batch": ({"global_batch_size": 10, "micro_batch_size": 4}, [], "10 is no multiple of 4 (micro batch 4 x 1 ranks)"),
    "fp16 on CPU": ({"precision": "fp16"}, [], "precision: fp16 does not run on CPU"),
    "vocabulary": ({"vocab_size": 200}, [], "have 256 tokens and the model only 200; pass --vocab-size 256"),
    "seq_len": ({"seq_len": 65}, [], "seq_len: 65 is beyond max_position_embeddings 64"),
    "no shards": ({"shards": "NOWHERE"}, [], "NOWHERE"),
    "shards is a file": ({"shards": "FILE"}, [], "FILE"),
    "empty shards": ({"shards": "EMPTY"}, [], "EMPTY"),
    "few tokens": ({"shards": "SMALL", "seq_len": 64}, ["--max-position-embeddings", "640", "--seq-len", "600"], "600"),
    "less than a step": ({"shards": "SMALL", "steps": None, "global_batch_size": 64}, [], "64 samples a step"),
    "warm-up": ({"warmup_steps": 11}, [], "warmup_steps: 11 is longer than the run of 10 steps"),
    "no JSON": ({"ds_config": "FILE"}, [], "FILE: line 1 column 1"),
    "missing JSON": ({"ds_config": "NOWHERE"}, [], "NOWHERE: No such file or directory"),
    "wrong JSON": ({"ds_config": "TYPO"}, [], "unknown section 'zero_optimisation'"),
    "no config": ({}, ["--config", "NOWHERE"], "NOWHERE: No such file or directory"),
    "no validation": ({"shards": "SMALL", "eval_every": 5, "seq_len": 16}, [], "has no validation split"),
    "preset": ({}, ["--model", "tyni"], "did you mean 'tiny'?"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_configuration_is_one_line_and_leaves_no_folder(tiny_corpus, tmp_path, capsys, no_group, case):
    places = {name: tmp_path / name for name in ("NOWHERE", "FILE", "EMPTY", "SMALL", "TYPO")}
    places["FILE"].write_text("not json")
    places["EMPTY"].mkdir()
    places["TYPO"].write_text('{"zero_optimisation": {"stage": 1}}')
    others, more, words = BAD[case]
    if others.get("shards") == "SMALL":
        write_corpus(places["SMALL"], tokens=100)
    others = {name: places.get(str(value), value) for name, value in others.items()}
    given = flags(others.pop("shards", tiny_corpus), tmp_path / "run", **others)
    if None in others.values():
        at = given.index("None")
        del given[at - 1 : at + 1]
    with pytest.raises(SystemExit) as exit_:
        run_main(lambda: minimind.train.main([*given, *(str(places.get(flag, flag)) for flag in more)]))
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert words in err
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_run_is_refused_and_left_alone(plain, tiny_corpus, tmp_path, no_group):
    before = {path: path.read_bytes() for path in plain.iterdir() if path.is_file()}
    with pytest.raises(UserError) as error:
        train(flags(tiny_corpus, plain, seed=7, hidden_size=64))
    for words in ("belongs to another configuration", "seed 42 there, 7 here", "hidden_size 32 there, 64 here"):
        assert words in str(error.value)
    other = write_corpus(tmp_path / "other", tokens=3000, seed=1)
    with pytest.raises(UserError, match="belongs to another configuration: shards"):
        train(flags(other, plain))
    assert {path: path.read_bytes() for path in plain.iterdir() if path.is_file()} == before


def test_a_run_folder_that_is_a_file_is_refused(tiny_corpus, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match="run"):
        train(flags(tiny_corpus, tmp_path / "run"))
    assert (tmp_path / "run").read_text() == "mine"


def test_damaged_shards_are_refused(tmp_path, no_group):
    corpus = write_corpus(tmp_path / "corpus", tokens=3000)
    manifest = corpus / "train" / "manifest.json"
    manifest.write_text(manifest.read_text()[:-20])
    with pytest.raises(UserError, match=r"manifest\.json"):
        train(flags(corpus, tmp_path / "run"))
    corpus = write_corpus(tmp_path / "other", tokens=3000)
    np.save(corpus / "train" / "shard_00000.npy", np.zeros(5, dtype=np.uint16))
    with pytest.raises(UserError, match=r"shard_00000.npy"):
        train(flags(corpus, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_would_run_and_touches_nothing(tiny_corpus, tmp_path, capsys, no_group):
    ds = ROOT / "ds_configs" / "zero3.json"
    assert minimind.train.main([*flags(tiny_corpus, tmp_path / "run", ds_config=ds), "--dry-run"]) == 0
    text, _, rest = capsys.readouterr().out.partition("\n{")
    model = MiniMindForCausalLM(
        ModelConfig(vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    )
    count = sum(parameter.numel() for parameter in model.parameters())
    samples = len(TokenDataset(open_split(tiny_corpus, "train"), 16))
    for words in (
        f"{count:,} parameters", "ZeRO stage 3", "4 samples = 1 x 4 accumulated x 1 ranks; 64 tokens a step",
        f"({samples / 4:.1f} steps an epoch)", "memory    about ", "640 tokens",
    ):  # fmt: skip
        assert words in text
    resolved = json.loads("{" + rest)
    assert resolved["run"]["train"]["precision"] == "fp32"
    assert resolved["deepspeed"]["train_batch_size"] == 4 and "auto" not in json.dumps(resolved["deepspeed"])
    assert not (tmp_path / "run").exists()


# As a program.


def run_program(*args: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "minimind.train", *args]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_the_program_ends_with_code_2_and_one_line():
    result = run_program("--epohcs", "3")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == (
        "error: unknown flag --epohcs; did you mean '--epochs'? (flags: python -m minimind.train --help)\n"
    )


def test_a_traceback_is_there_for_who_asks():
    """Together with the list of what a start imports: torch's compiler would take a quarter of its time."""
    result = run_program("--epohcs", "3", MINIMIND_TRACEBACK="1", PYTHONPROFILEIMPORTTIME="1")
    assert result.returncode == 1 and "Traceback" in result.stderr
    assert "muon.original_muon" in result.stderr and "torch._inductor.compile_fx" not in result.stderr
