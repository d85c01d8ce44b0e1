"""Saving when something goes wrong, the command line on a run, and other people's tools on our folders."""

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import unittest.mock
from pathlib import Path

import pytest
import torch
from repository import ROOT
from safetensors.torch import load_file
from training_runs import RankPool, flags_for, rank_pool, train

from minimind import checkpoint
from minimind.checkpoints.consolidate import TrainingCheckpoint
from minimind.checkpoints.engine_files import HashedFile, HostCopies, count_bytes
from minimind.checkpoints.folder import checkpoints_folder, list_checkpoints, portable_folder, verify_checkpoint
from minimind.checkpoints.formats import portable
from minimind.checkpoints.formats.load_model import load_model
from minimind.checkpoints.manifest import CheckpointError, read_manifest
from minimind.distributed.stop_requests import SAME_REQUEST_SECONDS, listen
from minimind.errors import UserError
from minimind.files import hash_file
from minimind.training.run_lock import hold_run_folder


@pytest.fixture(scope="module")
def run(tiny_corpus, tmp_path_factory):
    """A finished run with checkpoints of the steps 2, 4 and 6, not to be changed."""
    run_dir = tmp_path_factory.mktemp("run")
    train(flags_for(tiny_corpus, run_dir, eval_every=2))
    return run_dir


@pytest.fixture(scope="module")
def pool():
    yield from rank_pool(2)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs more rights than this process has")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_would_overflow_is_noticed_before_writing(tiny_corpus, small_disk):
    with pytest.raises(CheckpointError, match=r"the disk has .* left"):
        train(flags_for(tiny_corpus, small_disk / "run", hidden_size=64, save_every=1))
    assert list(checkpoints_folder(small_disk / "run").iterdir()) == []


@pytest.mark.parametrize("async_save", [True, False])
def test_a_disk_that_fills_up_while_writing_leaves_the_older_checkpoint(tiny_corpus, small_disk, async_save):
    flags = flags_for(tiny_corpus, small_disk / "run", save_every=1, keep_last=0, steps=50, async_save=async_save)
    no_check = unittest.mock.patch("minimind.checkpoints.saving.count_bytes", return_value=0)
    with no_check, pytest.raises(CheckpointError, match="No space left"):
        train(flags)
    folders = list_checkpoints(small_disk / "run")
    assert folders and not list(checkpoints_folder(small_disk / "run").glob("*.partial"))
    for folder in folders:
        verify_checkpoint(folder)


def fail_on_rank_one(flags: list[str]):
    """Train, with a rank 1 that cannot write."""

    def write(folder, states):
        raise OSError(5, "Input/output error", str(folder))

    if os.environ["RANK"] == "1":
        with unittest.mock.patch("minimind.checkpoints.saving.write_states", write):
            return train(flags)
    return train(flags)


def test_a_failure_at_one_rank_ends_all_with_its_words(tiny_corpus, tmp_path, pool: RankPool):
    pool.start(fail_on_rank_one, flags_for(tiny_corpus, tmp_path))
    for kind, error in pool.finish():
        assert kind == "error" and "rank 1" in str(error) and "Input/output error" in str(error)
    assert list(checkpoints_folder(tmp_path).iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line(tiny_corpus, tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match="checkpoints"):
        train(flags_for(tiny_corpus, tmp_path))


def test_a_second_job_is_refused(tiny_corpus, tmp_path):
    with hold_run_folder(tmp_path), pytest.raises(UserError, match="another job works in it"):
        train(flags_for(tiny_corpus, tmp_path))


def wait_in_listen(listens) -> None:
    with listen(None):
        listens.set()
        time.sleep(60)


def test_a_second_signal_ends_at_once_and_the_same_one_again_does_not():
    context = multiprocessing.get_context("forkserver")
    listens = context.Event()
    process = context.Process(target=wait_in_listen, args=(listens,))
    process.start()
    assert listens.wait(60)
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal and a launcher pass on one request
        os.kill(process.pid, number)
    process.join(0.3)
    assert process.exitcode is None
    time.sleep(SAME_REQUEST_SECONDS)
    os.kill(process.pid, signal.SIGTERM)
    process.join(10)
    assert process.exitcode == 128 + signal.SIGTERM


def test_a_hangup_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with listen(None):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_hash_is_that_of_the_bytes_on_the_disk(tmp_path):
    file = HashedFile(tmp_path / "x.pt")
    torch.save({"a": torch.arange(100_000), "b": torch.ones(3)}, file)
    record = file.finish()
    assert (record.size, record.sha256) == ((tmp_path / "x.pt").stat().st_size, hash_file(tmp_path / "x.pt"))
    if Path("/dev/full").exists():
        full = HashedFile(Path("/dev/full"))
        torch.save({"a": torch.arange(100_000)}, full)
        with pytest.raises(OSError, match="No space left"):
            full.finish()


def test_host_copies_no_longer_change_keep_ties_and_use_their_memory_again():
    weight = torch.ones(4, 4)
    copies = HostCopies()
    first = copies.copy({"a.pt": {"embed": weight, "head": weight, "rows": [weight[0], 3]}})["a.pt"]
    weight.add_(1)
    assert first["embed"] is first["head"] and bool((first["embed"] == 1).all()) and first["rows"][1] == 3
    second = copies.copy({"a.pt": {"embed": weight, "head": weight, "rows": [weight[0], 3]}})["a.pt"]
    assert second["embed"].data_ptr() == first["embed"].data_ptr() and bool((second["embed"] == 2).all())
    assert count_bytes({"a.pt": {"embed": weight, "head": weight}}) == 64 + (1 << 20)


def test_an_interrupted_conversion_leaves_nothing_that_looks_whole(run, tmp_path, capsys):
    folder = checkpoints_folder(tmp_path) / list_checkpoints(run)[-1].name
    shutil.copytree(list_checkpoints(run)[-1], folder)
    written = []

    def write_one(path, *args):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        path.write_bytes(b"half")

    with unittest.mock.patch.object(portable, "write_safetensors", write_one), pytest.raises(KeyboardInterrupt):
        portable.convert(folder)
    assert not portable_folder(folder).exists()
    assert checkpoint.main(["convert", str(folder)]) == 0 and "neutral_" in capsys.readouterr().out
    made, source = portable_folder(folder), TrainingCheckpoint(folder)
    before = made.stat().st_mtime_ns
    assert portable.convert(folder) == made and made.stat().st_mtime_ns == before  # once
    for key in ("fp32", "exp_avg", "exp_avg_sq"):
        tensors = load_file(made / f"{key}.safetensors")
        assert tensors.keys() == source.shapes.keys()
        assert all(torch.equal(tensor, source.read(name, key)) for name, tensor in tensors.items())
    (made / "exp_avg.safetensors").write_bytes(b"")
    assert portable.convert(folder) == made and load_file(made / "exp_avg.safetensors").keys() == source.shapes.keys()


def test_a_probe_that_differs_names_the_tensors(tiny_corpus, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")

    def disturb(engine, *args):
        with torch.no_grad():
            engine.module.model.norm.weight.mul_(2)
        return 1.0

    disturbed = unittest.mock.patch("minimind.checkpoints.loading.engine_probe_loss", disturb)
    with disturbed, pytest.raises(CheckpointError, match=r"tensors that differ: model.norm.weight$"):
        train(flags_for(tiny_corpus, tmp_path / "run", steps=8))
    read = TrainingCheckpoint.read

    def misread(self, name, key="fp32"):
        return read(self, name, key) * (1.1 if name == "model.norm.weight" else 1)

    with unittest.mock.patch.object(TrainingCheckpoint, "read", misread):
        for load in (load_model, lambda folder: checkpoint.main(["convert", str(folder)])):
            with pytest.raises(CheckpointError, match=r"probe batch .* tensors that differ: model.norm.weight$"):
                load(tmp_path / "run")
    assert not portable_folder(list_checkpoints(tmp_path / "run")[-1]).exists()
    assert checkpoint.main(["convert", str(tmp_path / "run")]) == 0


def test_command_lists_verifies_and_compares(run, tmp_path, capsys):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    assert checkpoint.main(["list", str(copied)]) == 0
    assert "step_00000006" in capsys.readouterr().out
    assert checkpoint.main(["verify", str(copied)]) == 0
    assert checkpoint.main(["diff", str(run), str(copied), "--optimizer"]) == 0
    old, new = list_checkpoints(copied)[0], list_checkpoints(copied)[-1]
    capsys.readouterr()
    assert checkpoint.main(["diff", str(old), str(new)]) == 1
    assert "model.norm.weight fp32: differs" in capsys.readouterr().out
    states = new / "mp_rank_00_model_states.pt"
    states.write_bytes(states.read_bytes()[:100])
    assert checkpoint.main(["verify", str(copied)]) == 1
    assert checkpoint.main(["list", str(copied)]) == 0
    assert re.search(r"step_00000006 +damaged", capsys.readouterr().out)
    assert checkpoint.main(["prune", str(copied), "--keep-last", "1", "--keep-best", "0", "--damaged"]) == 0
    assert [read_manifest(folder).step for folder in list_checkpoints(copied)] == [4]
    with pytest.raises(UserError, match="no checkpoints"):
        checkpoint.main(["list", str(tmp_path)])


def test_command_averages(run, tmp_path):
    folders = list_checkpoints(run)[:2]
    assert checkpoint.main(["average", *map(str, folders), "--output", str(tmp_path / "mean")]) == 0
    first, second = (load_model(folder)[0].state_dict() for folder in folders)
    model, _ = load_model(tmp_path / "mean")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2)
    with pytest.raises(UserError, match="exists already"):
        checkpoint.main(["average", str(run), "--output", str(tmp_path / "mean")])


@pytest.mark.slow
def test_killed_and_corrupted_runs_are_not_lost():
    script = ROOT / "tests" / "support" / "faults.py"
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "6", "--corruptions", "6"], capture_output=True, text=True, timeout=560
    )
    assert done.returncode == 0 and "lost: 0" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
