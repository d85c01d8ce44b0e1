"""The clusters, each started once, in folders that every user of the machine may enter; and the run to compare with."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from services import Hosts, Slurm, wait_until
from training_runs import flags_for, losses, rank_pool, train


@pytest.fixture(scope="module")
def open_folder() -> Iterator[Path]:
    """pytest's own folders are closed to other users, such as munge."""
    folder = Path(tempfile.mkdtemp(prefix="minimind-cluster-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def slurm(open_folder: Path) -> Iterator[Slurm]:
    cluster = Slurm(open_folder)
    try:
        wait_until(cluster.is_ready, 60, cluster.logs)
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def hosts(open_folder: Path) -> Iterator[Hosts]:
    both = Hosts(open_folder)
    yield both
    both.close()


@pytest.fixture(scope="session")
def reference(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of 150 steps at a constant rate on two ranks of one machine, without a launcher."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    for pool in rank_pool(2):
        pool.run(train, flags_for(tiny_corpus, run_dir, steps=150, save_every=0, schedule="constant"))
    return losses(run_dir)
