"""The clusters, each started once, in folders that every user of the machine may enter; and the run to compare with."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from services import ROOT, Hosts, Slurm, clean_environment, wait_until
from training_runs import flags_for, losses


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
    """The losses of 150 steps on two ranks of one machine, started without a cluster."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    command = ["bash", "launch/pretrain.sh", *flags_for(tiny_corpus, run_dir, steps=150, save_every=0)]
    environment = clean_environment(NUM_RANKS="2")
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300, capture_output=True)
    return losses(run_dir)
