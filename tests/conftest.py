"""What all tests share: one thread a process, a small corpus."""

import os
import sys
from pathlib import Path

# Before torch is imported, for this process and those it starts: threads that wait for one another cost products as
# small as the tests' many times what they give, most of all where several processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests are for the CPU wherever they run: those that start two ranks would want two GPUs. `-m gpu` shows them.
if "PYTEST_XDIST_WORKER" not in os.environ and "gpu" not in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if sys.platform == "darwin":
        os.environ["DS_ACCELERATOR"] = "cpu"
# Processes that the tests start find tests/support too.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parent / "support"), os.environ.get("PYTHONPATH")])
)

import pytest
from structured_corpus import write_corpus


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 30,000 training tokens, and 200 for validation, as every run evaluates at its end."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tiny", tokens=30_000, val_tokens=200)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: one that starts last would run alone at the end, on one core."""
    slow = {item.path for item in items if any(map(item.get_closest_marker, ("slow", "cluster")))}
    items.sort(key=lambda item: item.path not in slow)
