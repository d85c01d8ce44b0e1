"""A profile of a few steps: a trace that Chrome's viewer reads, a table whose parts are those of the step."""

import json
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType
from training_runs import RankPool, flags_for, rank_pool, train

from minimind.training.profiler import PARTS, sum_parts


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    yield from rank_pool(2)


def read_table(text: str) -> dict[str, float]:
    return {line.split()[0]: float(line.split()[1]) for line in text.splitlines()[1:]}


def test_each_rank_writes_a_trace_and_a_table(tiny_corpus, tmp_path, two_ranks):
    two_ranks.run(train, flags_for(tiny_corpus, tmp_path / "run", steps=8, profile_steps=3, save_every=0))
    for rank in (0, 1):
        base = tmp_path / "run" / "profile" / f"rank_{rank:04d}"
        names = [event.get("name", "") for event in json.loads(base.with_suffix(".json").read_text())["traceEvents"]]
        assert names.count("step.forward") == names.count("step.backward") == 3 * 2  # two micro-batches a step
        assert names.count("step.optimizer") == 3
        table = read_table(base.with_suffix(".txt").read_text())
        assert set(table) == {*PARTS, "idle", "communication"}
        assert table["forward"] > 0 and table["backward"] > 0 and table["optimizer"] > 0 and table["communication"] > 0


def test_a_run_without_it_leaves_none_and_a_short_one_ends_well(tiny_corpus, tmp_path):
    train(flags_for(tiny_corpus, tmp_path / "plain", steps=2))
    assert not (tmp_path / "plain" / "profile").exists()
    code, printed = train(flags_for(tiny_corpus, tmp_path / "run", steps=6, profile_steps=2))
    assert code == 0 and "ms a step" in printed


def test_a_part_that_the_device_has_a_range_of_is_not_counted_twice():
    def event(name: str, device: DeviceType, start: int, end: int) -> SimpleNamespace:
        span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        return SimpleNamespace(name=name, device_type=device, time_range=span)

    on_host, on_device = DeviceType.CPU, DeviceType.CUDA
    found = sum_parts(
        [
            event("step.data", on_host, 0, 10),
            event("step.forward", on_host, 10, 20),
            event("step.forward", on_device, 15, 115),
        ]
    )
    assert found["data"] == pytest.approx(10e-6) and found["forward"] == pytest.approx(100e-6)
