"""`--micro-batch-size auto` on a device with little memory: found by real steps, kept by a resume."""

import json

import pytest
from simulated_runs import train_with_memory
from training_runs import flags_for, train

from minimind.errors import UserError

LONG = {"seq_len": 512, "max_position_embeddings": 512, "micro_batch_size": "auto", "global_batch_size": 16}


def test_the_largest_that_fits_is_found_for_all_ranks_and_a_resume_takes_the_same(two_gpus, tiny_corpus, tmp_path):
    given = flags_for(tiny_corpus, tmp_path, **LONG, save_every=0, steps=1, warmup_steps=1)
    # The plan expects 8 to fit; on the simulated device attention keeps its scores, and 4 need 26 MiB, 8 need 51.
    (code, printed), (other_code, other_printed) = two_gpus.run(train_with_memory, 37 * 2**20, given)
    assert code == other_code == 0, printed + other_printed
    assert "micro     4 of a rank's 8 sequences a step: 4 fits, 8 does not in " in printed
    assert "batch     16 samples = 4 x 2 accumulated x 2 ranks" in printed and "micro  " not in other_printed
    assert json.loads((tmp_path / "run_config.json").read_text())["train"]["micro_batch_size"] == 4
    (code, printed), _ = two_gpus.run(train, given)
    assert code == 0 and "micro  " not in printed and "batch     16 samples = 4 x 2" in printed


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


def test_on_a_cpu_it_is_refused(tiny_corpus, tmp_path):
    with pytest.raises(UserError, match="auto is for GPUs; on a CPU"):
        train(flags_for(tiny_corpus, tmp_path, **LONG))
