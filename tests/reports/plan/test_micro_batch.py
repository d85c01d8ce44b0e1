"""The search for the largest micro-batch: by figures, and by real steps in real processes."""

from types import SimpleNamespace

import pytest
import torch

from minimind import plan
from minimind.config.deepspeed_file import load_ds_config
from minimind.config.resolve import resolve_run
from minimind.config.run_config import RunConfig
from minimind.errors import UserError
from minimind.reports.plan import micro_batch
from minimind.reports.plan.memory import estimate_memory
from minimind.reports.plan.micro_batch import fit_micro_batch, free_memory, search

MODEL = ["--model", "tiny", "--seq-len", "512", "--no-tensorboard"]


@pytest.mark.parametrize("limit", [100, 230, 1000, 12345])
def test_the_search_ends_at_the_last_that_fits_and_hardly_goes_beyond(limit):
    tried: list[int] = []

    def attempt(size: int) -> int | None:
        tried.append(size)
        held = 50 + 37 * size
        return held if held <= limit else None

    largest = search(attempt, limit)
    assert largest == (limit - 50) // 37
    assert len(tried) == len(set(tried)) and max(tried) <= largest + 1


def test_memory_that_does_not_grow_in_a_line_is_found_too():
    def attempt(size: int) -> int | None:
        held = size**2 + 10
        return held if held <= 1000 else None

    assert search(attempt, 1000) == 31
    assert search(lambda size: None, 1000) == 0
    assert search(lambda size: 5, 1000, largest=20) == 20


@pytest.mark.parametrize("share", [0.4, 1.0, 3.0])
def test_auto_begins_where_the_plan_ends_and_takes_a_divisor(monkeypatch, share):
    """Whether a step really takes more or less than planned, by the factor `share`."""
    run = RunConfig.from_dict({"model": "tiny", "train": {"micro_batch_size": 1, "global_batch_size": 24}})
    resolved = resolve_run(run, load_ds_config(None), world_size=2, device_type="cuda", bf16_supported=True)
    tried: list[int] = []

    def planned(one) -> int:
        return estimate_memory(one, "cuda").total

    def take_steps(one, ranks, limit):
        tried.append(one.train.micro_batch_size)
        assert (ranks, one.dp_size, one.train.gradient_accumulation_steps) == (1, 1, 1 if tried[-1] == 12 else 2)
        return {} if share * planned(one) <= limit else None

    monkeypatch.setattr(micro_batch, "try_steps", take_steps)

    def sized(micro: int) -> int:
        train = {"micro_batch_size": micro, "gradient_accumulation_steps": 2}
        one = RunConfig.from_dict({"model": "tiny", "train": train})
        return planned(resolve_run(one, load_ds_config(None), world_size=1, device_type="cuda", bf16_supported=True))

    limit = sized(4) + 1
    device = SimpleNamespace(mem_get_info=lambda device: (round(limit / micro_batch.USABLE_DEVICE) + 1, 0))
    monkeypatch.setattr(micro_batch, "device_module", lambda of: device)
    monkeypatch.setattr(micro_batch, "default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(micro_batch, "computes_bf16", lambda device: True)
    fitting = [size for size in (1, 2, 3, 4, 6, 12) if share * sized(size) <= limit]
    if not fitting:
        with pytest.raises(UserError, match="not even 1 sequence"):
            fit_micro_batch(resolved, 1)
        return
    found, words = fit_micro_batch(resolved, 1)
    assert found == max(fitting) and tried[0] == 4
    assert words.startswith(f"{found} of a rank's 12 sequences a step: ") and f"{found} fits" in words


@pytest.mark.slow
def test_real_steps_stop_below_the_limit(capsys):
    assert plan.main([*MODEL, "--find-micro-batch", "--gpu-memory", "160M"]) == 0
    lines = capsys.readouterr().out.splitlines()
    largest = int(lines[-1].split()[-1])
    peaks = {int(line.split()[0]): float(line.split()[1]) for line in lines[1:-1] if "tokens/s" in line}
    assert lines[-1].startswith("largest   --micro-batch-size ") and largest == max(peaks) >= 2
    assert all(peak <= 160 for peak in peaks.values())
    assert any(f"{largest + 1}    more than" in line for line in lines) or 2 * peaks[largest] - peaks[1] > 0.9 * 160


def test_a_model_that_does_not_fit_at_all_is_one_line():
    with pytest.raises(UserError, match=r"not even 1 sequence of 512 tokens fits 20.0 MiB"):
        plan.main([*MODEL, "--find-micro-batch", "--gpu-memory", "20M"])


def test_the_host_says_what_it_can_give():
    assert 2**20 < free_memory() < 2**50
