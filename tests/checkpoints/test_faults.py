"""What happens to machines: signals in a save, disks that turn read-only, no memory left, clocks, moved folders."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
import unittest.mock
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import PRELOAD, RankPool, flags_for, losses, rank_pool, read_metrics, train, train_rank

from minimind.checkpoints.folder import checkpoints_folder, list_checkpoints, verify_checkpoint
from minimind.checkpoints.manifest import CheckpointError
from minimind.checkpoints.saving import write_states
from minimind.distributed.launchers.local import find_free_port
from minimind.errors import EXIT_STOPPED, EXIT_USER_ERROR, UserError
from minimind.training.record.events import write_event
from minimind.training.trainer import Trainer


@pytest.fixture(scope="module")
def pool():
    yield from rank_pool(2)


@pytest.fixture(scope="module")
def whole(tiny_corpus, tmp_path_factory):
    """A run that nothing happened to, not to be changed."""
    run_dir = tmp_path_factory.mktemp("whole")
    train(flags_for(tiny_corpus, run_dir, dropout=0.1))
    return run_dir


@pytest.mark.parametrize("async_save", [True, False])
def test_sigterm_in_a_save_loses_nothing(tiny_corpus, tmp_path, whole, async_save):
    flags = flags_for(tiny_corpus, tmp_path, dropout=0.1, async_save=async_save)

    def write(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return write_states(*args)

    with unittest.mock.patch("minimind.checkpoints.saving.write_states", write):
        code, _ = train(flags)
    assert code == EXIT_STOPPED and max(losses(tmp_path)) < 6
    assert verify_checkpoint(list_checkpoints(tmp_path)[-1]).step == max(losses(tmp_path))
    assert train(flags)[0] == 0 and losses(tmp_path) == losses(whole)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Let a folder lie on a disk that is read-only, until the end of the block."""
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True, capture_output=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True, capture_output=True)
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_turns_read_only_is_one_line_and_loses_nothing(tiny_corpus, tmp_path, whole):
    flags = flags_for(tiny_corpus, tmp_path, dropout=0.1, async_save=False)
    saves = []
    with contextlib.ExitStack() as stack:

        def write(*args):
            saves.append(args)
            if len(saves) == 2:
                try:
                    stack.enter_context(read_only(checkpoints_folder(tmp_path)))
                except subprocess.CalledProcessError:
                    pytest.skip("mounting needs more rights than this process has")
            return write_states(*args)

        stack.enter_context(unittest.mock.patch("minimind.checkpoints.saving.write_states", write))
        with pytest.raises(CheckpointError, match=r"not saved: .*Read-only file system; free space or fix the folder"):
            train(flags)
        with pytest.raises(UserError, match="Read-only file system"):
            train(flags)
    code, printed = train(flags)
    assert code == 0 and "at step 2" in printed and losses(tmp_path) == losses(whole)


def train_until_memory_is_out(flags: list[str], output) -> tuple[int, str]:
    """Train, on a rank 1 whose device has no room for the fifth step."""
    step = Trainer.train_step

    def train_step(self, batches):
        if os.environ["RANK"] == "1" and self.state.step == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(self, batches)

    with unittest.mock.patch.object(Trainer, "train_step", train_step):
        return train(flags, output)


def test_a_rank_out_of_memory_ends_all_and_the_run_continues(tiny_corpus, tmp_path, pool: RankPool):
    flags = flags_for(tiny_corpus, tmp_path / "run", dropout=0.1)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port = find_free_port()
    ranks = [
        context.Process(
            target=train_rank, args=(flags, rank, 2, port, tmp_path / f"rank{rank}.log", train_until_memory_is_out)
        )
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    first, second = ((tmp_path / f"rank{rank}.log").read_text() for rank in range(2))
    # As it is the run cannot go on: no code that asks for another start.
    assert [process.exitcode for process in ranks] == [EXIT_USER_ERROR, EXIT_USER_ERROR], first + second
    assert "error: rank 1 on " in second and "is out of memory at step 5" in second and "--micro-batch" not in second
    assert "rank 0 on " in first and "is out of memory at step 5" in first, "the other rank heard nothing"
    assert "Traceback" not in first + second
    pool.run(train, flags_for(tiny_corpus, tmp_path / "whole", dropout=0.1))
    printed = pool.run(train, flags)[0][1]
    # The save of step 4 may or may not have been finished when the rank died.
    assert "resumed from" in printed and losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_clock_set_back_changes_nothing(tiny_corpus, tmp_path, whole):
    flags = flags_for(tiny_corpus, tmp_path, dropout=0.1, tensorboard=True)
    (tmp_path / "STOP").touch()
    train(flags)
    now = time.time()
    with unittest.mock.patch("time.time", lambda: now - 86_400):
        assert train(flags)[0] == 0
    assert losses(tmp_path) == losses(whole)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [
        (record["step"], pytest.approx(record["loss"])) for record in read_metrics(whole) if "loss" in record
    ]


def test_a_run_folder_that_was_moved_continues(tiny_corpus, tmp_path, whole):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "STOP").touch()
    train(flags_for(tiny_corpus, tmp_path / "here", dropout=0.1))
    (tmp_path / "here").rename(tmp_path / "there")
    code, printed = train(flags_for(tiny_corpus, tmp_path / "there", dropout=0.1))
    assert code == 0 and "at step 1" in printed and losses(tmp_path / "there") == losses(whole)


def test_an_older_checkpoint_beside_newer_ones_is_not_continued_in_the_same_folder(tiny_corpus, tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run")
    old = list_checkpoints(tmp_path / "run")[0]
    with pytest.raises(UserError, match="also holds step_00000004, step_00000006"):
        train(flags_for(tiny_corpus, tmp_path / "run", dropout=0.1, resume=old))
    code, printed = train(flags_for(tiny_corpus, tmp_path / "other", dropout=0.1, resume=old))
    assert code == 0 and "at step 2" in printed
    expected = losses(whole)
    assert losses(tmp_path / "other") == {step: expected[step] for step in range(3, 7)}
    with pytest.raises(UserError, match="seed 42 there, 1 here"):
        train(flags_for(tiny_corpus, tmp_path / "third", dropout=0.1, resume=old, seed=1))


def lose_files_of_rank_one(flags: list[str]) -> tuple[int, str]:
    """Train, on a rank 1 that writes onto a disk of its own."""

    def write(folder, states):
        own = folder.parent / "disk of rank 1" if os.environ["RANK"] == "1" else folder
        own.mkdir(exist_ok=True)
        return write_states(own, states)

    with (
        unittest.mock.patch("minimind.checkpoints.saving.write_states", write),
        unittest.mock.patch("minimind.checkpoints.saving.SECONDS_UNTIL_VISIBLE", 0.5),
    ):
        return train(flags)


def test_ranks_on_disks_of_their_own_are_found_at_the_first_save(tiny_corpus, tmp_path, pool: RankPool):
    with pytest.raises(UserError, match=r"is missing, seen from rank 0; run_dir must be on a disk that all"):
        pool.run(lose_files_of_rank_one, flags_for(tiny_corpus, tmp_path))
    assert list_checkpoints(tmp_path) == []


def test_the_loss_scale_of_fp16_continues(tmp_path):
    # fp16 itself does not run on CPUs.
    from types import SimpleNamespace

    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    from minimind.checkpoints.safe_load import read_states
    from minimind.checkpoints.zero_partitions import FlatTensors
    from minimind.parallel.loss_scale import read_grad_scaler, set_grad_scaler, set_loss_scaler

    def make_scaler() -> DynamicLossScaler:
        return DynamicLossScaler(2.0**16, 1000, 1, 2, False)

    scaler = make_scaler()
    with unittest.mock.patch("deepspeed.comm.get_rank", lambda: 0):
        for overflow in (True, True, False, True):
            scaler.update_scale(overflow)
    states = {
        "loss_scaler": scaler, "dynamic_loss_scale": True, "base_optimizer_state": {"state": {}},
        "single_partition_of_fp32_groups": [torch.ones(4)],
    }  # fmt: skip
    torch.save(states, tmp_path / "states.pt")
    saved = FlatTensors([{"w": (4,)}], [lambda: read_states(tmp_path / "states.pt")]).loss_scaler
    saved = json.loads(json.dumps(saved))  # as in a manifest
    fresh = make_scaler()
    set_loss_scaler(SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=fresh)), saved)
    assert vars(fresh) == vars(scaler) and fresh.cur_scale < 2.0**16

    def make_engine() -> SimpleNamespace:
        return SimpleNamespace(torch_autocast_z0_gradscaler=torch.amp.GradScaler("cpu", init_scale=2.0**16))

    engine = make_engine()
    engine.torch_autocast_z0_gradscaler.scale(torch.ones(1))
    engine.torch_autocast_z0_gradscaler.update(128.0)
    other = make_engine()
    set_grad_scaler(other, json.loads(json.dumps(read_grad_scaler(engine))))
    assert other.torch_autocast_z0_gradscaler.scale(torch.ones(1)) == 128


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(tiny_corpus, tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run")
    flags = flags_for(tiny_corpus, tmp_path / "run", dropout=0.1)
    shutil.rmtree(list_checkpoints(tmp_path / "run")[-1])
    code, printed = train(flags)
    assert (
        code == 0 and "step_00000006: saved by this run, and gone; continuing from the older step_00000004" in printed
    )
    assert "dropped what is beyond step 4 (to step 6): trained again" in printed
    assert losses(tmp_path / "run") == losses(whole)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    shutil.rmtree(checkpoints_folder(tmp_path / "run"))
    with pytest.raises(UserError, match=r"step 6 was saved, and .* holds no checkpoint; bring them back"):
        train(flags)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == metrics
    code, printed = train([*flags, "--resume", "never"])
    assert code == 0 and "dropped what is beyond step 0 (to step 6)" in printed
    # Killed before the first save of a new beginning, a run begins again.
    shutil.rmtree(checkpoints_folder(tmp_path / "run"))
    write_event(tmp_path / "run", "start", 0, "started")
    assert train(flags)[0] == 0 and losses(tmp_path / "run") == losses(whole)


def test_what_cannot_be_loaded_again_ends_at_the_first_save(tiny_corpus, tmp_path):
    flags = flags_for(tiny_corpus, tmp_path)
    broken = unittest.mock.patch(
        "deepspeed.DeepSpeedEngine.load_checkpoint", side_effect=KeyError("base_optimizer_state_step")
    )
    with (
        broken,
        pytest.raises(CheckpointError, match=r"saved, but DeepSpeed cannot load it again \(KeyError: 'base_opt"),
    ):
        train(flags)
    assert max(losses(tmp_path)) == 2


def test_a_checkpoints_folder_on_another_disk_is_followed(tiny_corpus, tmp_path, whole):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk")
    assert train(flags_for(tiny_corpus, tmp_path / "run", dropout=0.1, steps=6, save_every=4))[0] == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    code, printed = train(flags_for(tiny_corpus, tmp_path / "link", dropout=0.1))
    assert code == 0 and "at step 6" in printed and losses(tmp_path / "link") == losses(whole)
