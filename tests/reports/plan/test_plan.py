"""The plan: its table for the shipped models, its figures, its advice, and its mistakes in one line."""

import json
import re

import numpy as np
import pytest
from pytest import approx
from repository import ROOT
from training_runs import flags_for, train

from minimind import plan
from minimind.checkpoints.folder import list_checkpoints, verify_checkpoint
from minimind.config.resolve import resolve_run
from minimind.config.run_config import RunConfig
from minimind.errors import UserError
from minimind.model.presets import PRESETS
from minimind.reports.plan.advice import usual_learning_rate
from minimind.reports.plan.planned_run import PlanOptions, make_plan, with_stage
from minimind.reports.plan.scaling_law import ScalingLaw, fit_law
from minimind.reports.plan.table import kept_checkpoints
from minimind.units import format_bytes

ON_8 = ["--num-gpus", "8", "--gpu-memory", "80GiB", "--seq-len", "2048", "--micro-batch-size", "4"]
ON_8 = ["--optimizer", "adamw", *ON_8]


def run(capsys, *flags: str) -> tuple[int, str]:
    code = plan.main(list(flags))
    return code, capsys.readouterr().out


def rows(text: str) -> dict[str, list[str]]:
    """The memory table, by its first column."""
    cells = [re.split(r" {2,}", line) for line in text.split("\n\n")[1].splitlines()]
    return {name: values for name, *values in cells}


@pytest.mark.parametrize("model", ["minimind3", "minimind3-moe", "large"])
def test_the_table_of_a_model_on_eight_gpus(capsys, model):
    code, text = run(capsys, "--model", model, *ON_8)
    table, params = rows(text), PRESETS[model].num_params()
    assert code == 0 and table["a rank"] == [
        "ZeRO 0", "ZeRO 1*", "ZeRO 2", "ZeRO 3", "2 +offload", "3 +offload", "3 +both"
    ]  # fmt: skip
    whole, part = format_bytes(2 * params), format_bytes(params // 8 * 2)
    assert table["parameters"] == [format_bytes(4 * params), whole, whole, part, whole, part, "0"]
    share = format_bytes(params // 8 * 12)
    assert table["optimizer"] == [format_bytes(8 * params), share, share, share, "0", "0", "0"]
    assert ("of which experts" in table) == PRESETS[model].use_moe
    assert table["fits"] == ["yes"] * 7 and table["host"][:4] == ["0"] * 4
    assert all(int(cell) >= 4 for cell in table["largest micro-batch"])


def test_the_largest_micro_batch_of_the_table_is_the_plans_own_fit(capsys):
    largest = int(rows(run(capsys, "--model", "large", *ON_8)[1])["largest micro-batch"][1])
    flags = ["--model", "large", *ON_8[:-1]]
    assert run(capsys, *flags, str(largest))[0] == 0
    code, text = run(capsys, *flags, str(largest + 1))
    assert code == 1 and f"lower --micro-batch-size {largest + 1} to {largest}" in text


def test_time_cost_and_disk(capsys):
    code, text = run(
        capsys, "--model", "minimind3", *ON_8, "--tokens", "1.048576e9", "--tokens-per-second", "1e6", "--price", "2",
        "--save-every", "1000", "--num-nodes", "2",
    )  # fmt: skip
    assert code == 0
    assert "17 minutes: 1,048,576,000 tokens, 8,000 steps, at 1,000,000 tokens/s" in text
    hours = 1.048576e9 / 1e6 / 3600
    assert f"cost      {16 * hours:,.1f} GPU-hours, {32 * hours:,.2f} at 2 a GPU-hour" in text
    size = PRESETS["minimind3"].num_params() * 14
    assert f"disk      {format_bytes(size)} a checkpoint; up to {format_bytes(5 * size)} for 4 kept" in text


def test_the_speed_follows_from_mfu_and_the_data_sheet(capsys):
    _, text = run(capsys, "--model", "minimind3", *ON_8, "--tokens", "1e9", "--gpu", "H100", "--mfu", "0.4")
    speed = 0.4 * 989e12 * 8 / PRESETS["minimind3"].flops_per_token(2048)
    assert f"at {speed:,.0f} tokens/s = 40% of 8 x H100" in text


ADVICE = {
    "too large for": ["--tokens", "5e7", "--gradient-accumulation-steps", "2"],
    "tokens a parameter": ["--tokens", "1e8"],
    "too few steps": ["--steps", "100", "--global-batch-size", "8", "--micro-batch-size", "1"],
    "is as long as the run": ["--tokens", "6553600", "--warmup-steps", "100"],
    "of the run; 1% to 5%": ["--steps", "5000", "--warmup-steps", "2500"],
    "far above": ["--lr", "0.05"],
    "far below": ["--lr", "1e-6"],
    "ZeRO 3 sends every weight twice": ["--ds-config", "ds_configs/zero3.json"],
    "offload costs much speed": ["--ds-config", "ds_configs/zero2_offload.json"],
    "weights cross the network": ["--ds-config", "ds_configs/zero3.json", "--num-nodes", "2"],
    "larger than models of this size profit from": ["--global-batch-size", "4096"],
    "tokens an expert in a forward": ["--model", "moe-64e", "--seq-len", "128", "--micro-batch-size", "1"],
    "the micro-batch may grow": ["--gradient-accumulation-steps", "8"],
    "the run fits without it": ["--activation-checkpointing"],
    "fp32 runs many times slower": ["--precision", "fp32"],
    "whatever the micro-batch": ["--model", "large", "--gpu-memory", "7GiB", "--micro-batch-size", "1"],
}


@pytest.mark.parametrize("said", ADVICE)
def test_an_expert_warns(capsys, monkeypatch, said):
    monkeypatch.chdir(ROOT)
    _, text = run(capsys, "--model", "minimind3", *ON_8, *ADVICE[said])
    assert said in text, text


def test_a_sound_plan_has_no_warning(capsys):
    flags = ["--model", "medium", "--num-gpus", "8", "--seq-len", "2048", "--micro-batch-size", "16"]
    _, text = run(capsys, *flags, "--gpu-memory", "80GiB", "--tokens", "20e9", "--lr", "6e-4")
    assert "warning" not in text, text


def test_the_usual_rate_falls_with_size():
    assert usual_learning_rate(10**9) == pytest.approx(3.5e-4, rel=0.02)
    assert usual_learning_rate(10**8) > usual_learning_rate(10**10) > 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num-gpus", "0"], "num_gpus: 0"),
        (["--gpu-memory", "lots"], "gpu_memory: 'lots'"),
        (
            ["--compute-optimal", "much"],
            "compute_optimal: 'much' is no budget; write operations, such as 1e19, or hours",
        ),
        (["--compute-optimal", "24h"], "compute_optimal: hours of what? give --gpu NAME, or operations"),
        (["--gpu", "H1000"], "did you mean 'H100'?"),
        (["--mfu", "40"], "mfu: 40.0 is not a finite number above 0 and up to 1; write 0.4 for 40%"),
        (["--mfu", "0.4", "--tokens-per-second", "5"], "mfu: not together"),
        (["--tokens", "1e9", "--steps", "3"], "tokens: 1e+09 disagree with 3 steps"),
        (["--tokenz", "1"], "unknown flag --tokenz; did you mean '--tokens'?"),
        (["--micro-batch-size", "3", "--global-batch-size", "4"], "global_batch_size"),
    ],
)
def test_a_mistake_is_one_line(flags, words):
    with pytest.raises(UserError) as error:
        plan.main(["--model", "minimind3", *flags])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_best_use_of_a_budget(capsys):
    code, text = run(capsys, "--compute-optimal", "1.2e20", "--seq-len", "2048")
    assert code == 0 and "1,000,000,000 parameters and 20,000,000,000 tokens" in text
    starred = [line.split() for line in text.splitlines() if line.split()[:1] and line.split()[0].endswith("*")]
    tokens = 1.2e20 / PRESETS["large"].flops_per_token(2048)
    assert [cells[0] for cells in starred] == ["large*", "*"] and starred[0][2] == f"{tokens:,.0f}"
    hours = run(capsys, "--compute-optimal", "10h", "--gpu", "H100", "--num-gpus", "8", "--mfu", "0.5")[1]
    assert hours.splitlines()[0] == f"budget    {10 * 3600 * 8 * 0.5 * 989e12:.3g} operations"


def test_a_law_of_ones_own_gives_another_use_of_a_budget(capsys, tmp_path):
    truth = ScalingLaw(floor=0.5, size=30.0, tokens=100.0, size_exponent=0.3, token_exponent=0.35)
    points = [(n, d, truth(n, d)) for n in (3e5, 1e6, 3e6) for d in (1e5, 3e5, 1e6, 3e6)]
    law = fit_law(np.array(points))
    assert law[:5] == approx(truth[:5], rel=1e-3) and law(1e7, 1e7) == approx(truth(1e7, 1e7), rel=1e-6)
    with pytest.raises(UserError, match="do not fall with size and tokens"):
        fit_law(np.array([(n, d, 1 / loss) for n, d, loss in points]))
    best = law.best_size(1e16)
    losses = {scale: law(best * scale, 1e16 / 6 / best / scale) for scale in (0.8, 1.0, 1.25)}
    assert min(losses, key=losses.get) == 1.0
    file = tmp_path / "law.json"
    file.write_text(json.dumps({"measured": {"law": law._asdict()}}))
    text = run(capsys, "--compute-optimal", "1e16", "--law", str(file))[1]
    assert f"best      {best:,.0f} parameters" in text and f"{losses[1.0]:.3f} bits a byte" in text
    assert f"beyond    {1e16 / (6 * 3e6 * 3e6):,.0f} times the largest run" in text
    assert "beyond" not in run(capsys, "--compute-optimal", "1e14", "--law", str(file))[1]
    file.write_text(json.dumps({"measured": {"law": {**law._asdict(), "size": -1}}}))
    with pytest.raises(UserError, match="is none: all but the floor are above 0"):
        plan.main(["--compute-optimal", "1e16", "--law", str(file)])
    file.write_text("{}")
    with pytest.raises(UserError, match="holds none; give the JSON that"):
        plan.main(["--compute-optimal", "1e16", "--law", str(file)])


def propose(capsys, *flags: str) -> tuple[int, list[dict[str, str]], str]:
    """Exit code, the table of mixtures by its heads, and the flags to type."""
    code, text = run(capsys, "--propose", *flags)
    head, *found = [re.split(r" {2,}", line.strip()) for line in text.split("\n\n")[1].splitlines()]
    return code, [dict(zip(head, cells, strict=True)) for cells in found], text.split("flags     ")[1]


LONG = ["--seq-len", "1000000", "--max-position-embeddings", "1000000", "--num-gpus", "8", "--gpu-memory"]


def test_a_million_tokens_are_shared_by_as_many_ranks_as_their_memory_asks_for(capsys):
    code, found, flags = propose(capsys, "--model", "minimind3", *LONG, "80GiB")
    assert code == 0 and (found[0]["sp"], found[0]["dp"], found[0]["recomputes"]) == ("4", "2", "no")
    assert flags.startswith("--sp-size 4 --micro-batch-size 1 --global-batch-size 2 --ds-config ds_configs/zero")
    typed = flags.split(" --ds-config")[0].split()
    code, text = run(capsys, "--model", "minimind3", *LONG, "80GiB", *typed)
    assert code == 0 and "ZeRO stage 1, sp 4 x tp 1" in text and "= 1 x 1 accumulated x 2 groups of ranks" in text
    _, found, flags = propose(capsys, "--model", "minimind3", *LONG, "24GiB")
    assert found[0]["recomputes"] == "yes" and "--activation-checkpointing" in flags
    code, text = run(capsys, "--propose", "--model", "large", *LONG, "16GiB")
    assert code == 1 and "nothing   fits" in text


def test_a_short_model_stays_data_parallel_and_keeps_its_batch(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = ["--model", "medium", "--seq-len", "2048", "--num-gpus", "8", "--gpu-memory", "80GiB"]
    _, found, said = propose(capsys, *flags, "--global-batch-size", "64", "--ds-config", "ds_configs/zero2.json")
    assert (found[0]["dp"], found[0]["sp"], found[0]["tp"]) == ("8", "1", "1")
    assert "--global-batch-size 64" in said and all("64 = " in row["batch = micro x accumulated x dp"] for row in found)
    # Fewer sequences than ranks: some ranks must share one.
    _, found, said = propose(capsys, *flags, "--global-batch-size", "4")
    assert {row["dp"] for row in found} <= {"4", "2", "1"} and "-size 2" in said


def test_offload_is_proposed_where_nothing_fits_without(capsys):
    _, found, said = propose(capsys, "--model", "large", "--seq-len", "2048", "--gpu-memory", "12GiB")
    assert "+offload" in found[0]["ZeRO"] and said.strip().endswith("_offload.json")


def test_a_stage_that_cannot_run_this_has_no_column():
    ds = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Lion", "params": {"lr": 1e-4}}}
    found = make_plan(RunConfig(model=PRESETS["minimind3"]), ds, PlanOptions(num_gpus=2, gpu_memory="80GiB"))
    assert found.columns["ZeRO 0"] is None and found.columns["ZeRO 2"] is found.own


def test_the_other_stages_leave_the_users_file_alone():
    ds = {
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "nvme", "nvme_path": "/x"},
            "reduce_bucket_size": 5,
        }
    }
    changed = with_stage(ds, 2, ("optimizer",))
    assert changed["zero_optimization"] == {
        "stage": 2, "reduce_bucket_size": 5, "offload_optimizer": {"device": "cpu"}
    }  # fmt: skip
    assert ds["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize(
    ("stage", "precision", "optimizer"),
    [(0, "fp32", "adamw"), (1, "fp32", "muon"), (2, "bf16", "adamw"), (3, "bf16", "adamw")],
)
def test_the_size_of_a_checkpoint_is_that_of_a_real_one(tiny_corpus, tmp_path, stage, precision, optimizer):
    wide = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "optimizer": optimizer}
    flags = flags_for(tiny_corpus, tmp_path / "run", stage=stage, precision=precision, steps=1, warmup_steps=1, **wide)
    train(flags)
    (folder,) = list_checkpoints(tmp_path / "run")
    real = sum(record.size for record in verify_checkpoint(folder).files)
    content = json.loads((tmp_path / "run" / "run_config.json").read_text())
    content.pop("shard_fingerprint")
    ds = json.loads((tmp_path / "run" / "ds_config.json").read_text())
    resolved = resolve_run(RunConfig.from_dict(content), ds, world_size=1)
    assert resolved.checkpoint_bytes == pytest.approx(real, rel=0.1)
    assert kept_checkpoints(resolved.train, 10) == 4
