"""The search for the largest micro-batch: by figures, and by real steps in real processes."""

import pytest

from minimind import plan
from minimind.errors import UserError
from minimind.reports.plan.micro_batch import free_memory, search

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
