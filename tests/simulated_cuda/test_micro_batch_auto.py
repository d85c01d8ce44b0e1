"""`--micro-batch-size auto` on a device with little memory: found by real steps, kept by a resume."""

import dataclasses
import json

import pytest
from simulated_runs import train_with_memory
from tokenizers_for_tests import save_byte_level
from training_runs import flags_for, train

from data_prep.tokenize_corpus import prepare
from data_prep.tokenize_preferences import TokenizePreferencesFlags
from data_prep.writing.encode_chat import PreferenceOptions
from minimind.config.resolve import resolve_run
from minimind.config.run_config import RunConfig
from minimind.errors import UserError
from minimind.training.run_folder import recorded_micro_batch_size

LONG = {"seq_len": 512, "max_position_embeddings": 512, "micro_batch_size": "auto", "global_batch_size": 8}


def test_the_largest_that_fits_is_found_for_all_ranks(two_gpus, tiny_corpus, tmp_path):
    given = flags_for(tiny_corpus, tmp_path, **LONG, save_every=0, steps=1, warmup_steps=1)
    # The plan expects 4 to fit; on the simulated device attention keeps its scores.
    (code, printed), (other_code, other_printed) = two_gpus.run(train_with_memory, 37 * 2**20, given)
    assert code == other_code == 0, printed + other_printed
    micro = json.loads((tmp_path / "run_config.json").read_text())["train"]["micro_batch_size"]
    assert micro in (1, 2)
    assert f"micro     {micro} of a rank's 4 sequences a step: {micro} fits, {2 * micro} does not in " in printed
    assert f"batch     8 samples = {micro} x {4 // micro} accumulated x 2 ranks" in printed


def test_a_resume_takes_the_same(tmp_path):
    train = resolve_run(RunConfig(), {}, world_size=1).train
    train = dataclasses.replace(train, run_dir=str(tmp_path))
    assert recorded_micro_batch_size(train) is None
    (tmp_path / "run_config.json").write_text('{"train": {"micro_batch_size": 4}}')
    assert recorded_micro_batch_size(train) == 4
    assert recorded_micro_batch_size(dataclasses.replace(train, resume="never")) is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: with --micro-batch-size auto it follows"),
        ({"global_batch_size": None}, "micro_batch_size: auto needs --global-batch-size"),
    ],
)
def test_auto_that_would_decide_more_than_memory_is_refused(one_gpu, tiny_corpus, tmp_path, settings, said):
    flags = flags_for(tiny_corpus, tmp_path, **{**LONG, **settings})
    if "None" in flags:
        at = flags.index("None")
        del flags[at - 1 : at + 1]
    ((code, printed),) = one_gpu.run(train_with_memory, 2**30, flags)
    assert code == 1 and printed.startswith(said)


def test_steps_that_hold_more_than_those_of_pretraining_are_refused(one_gpu, tmp_path):
    turn = [{"role": "user", "content": "say a"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "judged.jsonl").write_text(json.dumps({"messages": turn, "label": True}) + "\n")
    names = {"tokenizer": save_byte_level(tmp_path / "tokenizer"), "output": tmp_path / "shards", "val_fraction": 0.0}
    given = (str(tmp_path / "judged.jsonl"),)
    prepare(TokenizePreferencesFlags(input=given, workers=1, unpaired=True, **names), PreferenceOptions)
    flags = flags_for(tmp_path / "shards/train", tmp_path / "run", **{**LONG, "vocab_size": 400})
    ((code, printed),) = one_gpu.run(train_with_memory, 2**30, flags)
    assert code == 1 and printed.startswith("micro_batch_size: auto tries steps of pretraining, and kto holds more")


def test_on_a_cpu_it_is_refused(tiny_corpus, tmp_path):
    with pytest.raises(UserError, match="auto is for GPUs; on a CPU"):
        train(flags_for(tiny_corpus, tmp_path, **LONG))
