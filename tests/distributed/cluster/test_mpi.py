"""launch/pretrain_mpi.sh under Open MPI and under MPICH, two ranks each."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from services import BIN, are_gone, launched, ranks_of, wait_until
from training_runs import flags_for, losses

pytestmark = pytest.mark.cluster

# Open MPI wants to be asked twice before it lets root run anything.
ROOT_MAY = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@pytest.fixture(params=["openmpi", "mpich"])
def mpirun(request) -> tuple[list[str], dict[str, str]]:
    """The command up to its own flags, and its environment."""
    if request.param == "openmpi":
        program, flags = shutil.which("mpirun.openmpi"), ["-np", "2", "--oversubscribe"]
    else:
        program, flags = shutil.which("mpiexec.hydra", path=BIN), ["-np", "2"]
    if program is None:
        pytest.skip(f"{request.param} is not installed")
    return ["bash", "launch/pretrain_mpi.sh", *flags, "--"], {"MPIRUN": program, **ROOT_MAY}


def test_two_ranks_under_mpirun_are_the_run_without_it(mpirun, tiny_corpus, tmp_path, reference):
    command, environment = mpirun
    run_dir = tmp_path / "a b; $(touch pwned) 'q'"
    flags = flags_for(tiny_corpus, run_dir, steps=20, save_every=0, schedule="constant")
    with launched([*command, *flags], tmp_path / "out", **environment) as process:
        assert process.wait(240) == 0, (tmp_path / "out").read_text()
    assert losses(run_dir) == {step: reference[step] for step in range(1, 21)}
    assert not list(tmp_path.rglob("pwned")) and not Path("pwned").exists()


def test_a_killed_rank_ends_the_others(mpirun, tiny_corpus, tmp_path):
    command, environment = mpirun
    run_dir, output = tmp_path / "run", tmp_path / "out"
    with launched([*command, *flags_for(tiny_corpus, run_dir, steps=100_000)], output, **environment) as process:
        wait_until(lambda: (run_dir / "checkpoints").is_dir(), 120, output.read_text)
        ranks = ranks_of(run_dir)
        assert sorted(ranks) == [0, 1]
        os.kill(ranks[1], signal.SIGKILL)
        began = time.monotonic()
        assert process.wait(60) != 0
        wait_until(lambda: are_gone(list(ranks.values())), 60, output.read_text)
        assert time.monotonic() - began < 60
