"""The run's configuration: files, flags above them, and everything that is refused before anything starts."""

import dataclasses
import json
import subprocess
import sys

import pytest

from minimind.config.command_line import PROGRAM, parse_command_line
from minimind.config.run_config import DataConfig, RunConfig, TrainConfig, check_run, preset
from minimind.errors import UserError
from minimind.model.config import ModelConfig
from minimind.model.presets import PRESETS


def parse(line: str) -> RunConfig:
    return parse_command_line(line.split()).run


def test_defaults_are_minimind3_with_everything_unset_that_the_json_may_set():
    run = parse("")
    assert run == RunConfig() and run.model == PRESETS["minimind3"]
    unset = {field.name for field in dataclasses.fields(TrainConfig) if getattr(run.train, field.name) is None}
    assert {"lr", "betas", "precision", "micro_batch_size", "optimizer", "schedule", "max_grad_norm"} <= unset


def test_flags_are_the_field_names_with_hyphens_over_a_preset():
    run = parse(
        "--model tiny --num-hidden-layers 2 --no-tie-word-embeddings --shards d --seq-len 16 --document-mask "
        "--ds-config z.json --run-dir r --steps 7 --micro-batch-size 2 --global-batch-size 8 --lr 1e-3 "
        "--precision bf16 --seed 5 --save-every 3 --eval-every 4 --resume never --betas 0.8 0.9"
    )
    assert run.model == dataclasses.replace(PRESETS["tiny"], num_hidden_layers=2, tie_word_embeddings=False)
    assert run.data == DataConfig(shards="d", seq_len=16, document_mask=True)
    assert (run.train.steps, run.train.lr, run.train.betas, run.train.precision) == (7, 1e-3, (0.8, 0.9), "bf16")
    assert (run.train.ds_config, run.train.resume, run.train.save_every) == ("z.json", "never", 3)


def test_a_field_with_a_value_equal_to_its_default_still_overrides_the_file(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"model": "tiny", "data": {"seq_len": 64}, "train": {"seed": 7, "lr": 0.1}}))
    run = parse(f"--config {path} --seed 42")
    assert (run.train.seed, run.train.lr, run.data.seq_len, run.model) == (42, 0.1, 64, PRESETS["tiny"])
    assert parse(f"--config {path} --model minimind3").model == PRESETS["minimind3"]
    assert not parse_command_line(["--config", str(path)]).dry_run
    assert parse_command_line(["--config", str(path), "--dry-run"]).dry_run


def test_the_run_config_of_a_run_is_a_config_file(tmp_path):
    run = parse("--model tiny --seq-len 32 --betas 0.8 0.9 --steps 3 --warmup-steps 1")
    path = tmp_path / "run_config.json"
    path.write_text(json.dumps({**run.to_dict(), "shard_fingerprint": "ab"}))
    assert parse(f"--config {path}") == run
    assert RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run


def test_a_preset_in_a_file_may_have_fields_on_top(tmp_path):
    run = RunConfig.from_dict({"model": {"preset": "tiny", "num_hidden_layers": 1}})
    assert run.model == dataclasses.replace(PRESETS["tiny"], num_hidden_layers=1)
    assert RunConfig.from_dict({"model": {"hidden_size": 64}}).model == ModelConfig(hidden_size=64)
    assert PRESETS["tiny"].num_hidden_layers != 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "line 1 column 2: Expecting property name enclosed in double quotes"),
        ("[1]", "expected an object with model, data and train, found list"),
        ('{"modle": {}}', "unknown section 'modle'; did you mean 'model'?"),
        ('{"model": "tyni"}', "model: no preset 'tyni'; did you mean 'tiny'?"),
        ('{"model": {"preset": 5}}', "model: no preset '5'"),
        ('{"model": 5}', "model: expected an object with fields, found int 5"),
        ('{"model": null}', "model: expected an object with fields, found NoneType None"),
        ('{"model": {"hiden_size": 5}}', "model: unknown field 'hiden_size'; did you mean 'hidden_size'?"),
        ('{"model": {"hidden_size": 65}}', "hidden_size: 65 does not divide by num_attention_heads=8"),
        ('{"train": {"lr": "fast"}}', "train: lr: 'fast' is not a number or null"),
        ('{"train": {"lr": NaN}}', "lr: nan is not a finite number above 0"),
        ('{"train": {"precision": "bf17"}}', "train: precision: 'bf17' is not one of"),
        ('{"train": [1]}', "train: expected an object with fields, found list [1]"),
        ('{"data": {"seq_length": 5}}', "data: unknown field 'seq_length'; did you mean 'seq_len'?"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, content, words):
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        parse(f"--config {path}")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"--config .*nowhere: No such file or directory"):
        parse(f"--config {tmp_path}/nowhere")
    with pytest.raises(UserError, match="Is a directory"):
        parse(f"--config {tmp_path}")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="not UTF-8 text"):
        parse(f"--config {tmp_path}/bytes")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--sede 3", "unknown flag --sede; did you mean '--seed'?"),
        ("--model.hidden-size 64", "unknown flag --model.hidden-size; did you mean '--hidden-size'?"),
        ("--model tyni", "no preset 'tyni'; did you mean 'tiny'? (presets: "),
        ("--model", "--model: a value is missing"),
        ("--precision fp17", "'fp17' is not one of bf16, fp16, fp32"),
        ("--hidden-size 100", "hidden_size: 100 does not divide by num_attention_heads=8"),
        ("--model tiny --seq-len 1024", "seq_len: 1024 is beyond max_position_embeddings 512"),
        ("--seq-len 0", "seq_len: 0 is not a finite number of 1 or more"),
        ("--steps 0", "steps: 0 is not"),
        ("--micro-batch-size 0", "micro_batch_size: 0 is not"),
        ("--global-batch-size -4", "global_batch_size: -4 is not"),
        ("--save-every -1", "save_every: -1 is not"),
        ("--log-every 0", "log_every: 0 is not"),
        ("--seed -1", "seed: -1 is not"),
        ("--seed 99999999999999999999", "seed: 99999999999999999999 is not a number from 0 to 9.22337e+18"),
        ("--lr 0", "lr: 0.0 is not a finite number above 0"),
        ("--lr nan", "lr: nan is not"),
        ("--lr inf", "lr: inf is not"),
        ("--epochs inf", "epochs: inf is not"),
        ("--epochs 0", "epochs: 0.0 is not"),
        ("--max-grad-norm inf", "max_grad_norm: inf is not a finite number of 0 or more"),
        ("--max-grad-norm -1", "max_grad_norm: -1.0 is not"),
        ("--weight-decay nan", "weight_decay: nan is not"),
        ("--betas 0.9 1.0", "betas: (0.9, 1.0) are not each a finite number of 0 or more and below 1"),
        ("--min-lr-ratio 1.5", "min_lr_ratio: 1.5 is not a number from 0 to 1"),
        ("--decay-ratio nan", "decay_ratio: nan is not a number from 0 to 1"),
        ("--lr-gamma 2", "lr_gamma: 2.0 is not a number from 0 to 1"),
        ("--steps 5 --warmup-steps 6", "warmup_steps: 6 is longer than the run of 5 steps"),
        ("--run-dir=", "run_dir: empty"),
        ("--shards=", "shards: empty"),
        ("--resume=", "resume: empty"),
    ],
)
def test_a_wrong_flag_is_one_line(line, words):
    with pytest.raises(UserError) as error:
        parse(line)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_check_run_takes_every_preset_at_its_longest():
    for config in PRESETS.values():
        check_run(RunConfig(model=config, data=DataConfig(seq_len=config.max_position_embeddings)))
    with pytest.raises(UserError, match="no preset 'nothing'"):
        preset("nothing")


def test_help_names_the_command_presets_and_documented_defaults(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse("--help")
    assert not exit_.value.code
    text = " ".join(capsys.readouterr().out.replace("│", " ").replace("|", " ").split())
    assert text.startswith(f"usage: {PROGRAM}")
    assert "tiny" in text and "minimind3" in text
    assert "(default: 5e-4; beside Muon 2.56 / hidden_size)" in text
    assert "(default: None)" not in text.split("--vocab-size")[0]
    for name in (field.name for field in dataclasses.fields(TrainConfig)):
        assert f"--{name.replace('_', '-')}" in text


def test_a_configuration_is_read_without_torch():
    code = (
        "import sys, minimind.config.command_line, minimind.config.resolve; "
        "print([name for name in ('torch', 'deepspeed') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
