"""Checkpoint folders as files: the sealed manifest, damage of every kind, retention, an interrupted save."""

import dataclasses
import hashlib
import random
import shutil
from pathlib import Path

import pytest

from minimind.checkpoints.folder import (
    check_latest,
    checkpoint_name,
    checkpoints_folder,
    find_checkpoint,
    list_checkpoints,
    newest_valid,
    point_latest,
    step_of,
    verify_checkpoint,
)
from minimind.checkpoints.manifest import MANIFEST_NAME, CheckpointError, CheckpointManifest, FileRecord, read_manifest
from minimind.checkpoints.retention import clear_partials, prune
from minimind.files import partial_folder

FILES = {
    "mp_rank_00_model_states.pt": b"model" * 100,
    "zero_pp_rank_0_mp_rank_00_optim_states.pt": b"optimizer" * 200,
    "offloaded_tensors/rank00/swap.bin": b"\0" * 64,
}


def make_checkpoint(run_dir: Path, step: int, *, name: str | None = None, **facts) -> Path:
    folder = checkpoints_folder(run_dir) / (name or checkpoint_name(step))
    records = []
    for path, content in FILES.items():
        content = content + str(step).encode()
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
        records.append(FileRecord(path, len(content), hashlib.sha256(content).hexdigest()))
    manifest = CheckpointManifest(step=step, files=tuple(records), model={"hidden_size": 8}, **facts)
    (folder / MANIFEST_NAME).write_text(manifest.to_json())
    return folder


def steps_of(run_dir: Path) -> list[int]:
    return [step_of(folder) for folder in list_checkpoints(run_dir)]


def test_manifest_comes_back_as_it_was_written(tmp_path):
    folder = make_checkpoint(tmp_path, 3, tokens_seen=10, eval_loss=1.5, layout={"optimizer": "adamw"})
    manifest = verify_checkpoint(folder)
    assert (manifest.step, manifest.tokens_seen, manifest.eval_loss) == (3, 10, 1.5)
    assert manifest.layout == {"optimizer": "adamw"} and len(manifest.files) == 3


def damage(folder: Path, rng: random.Random) -> str:
    """Do one random harm to a checkpoint; gives what it was."""
    path = folder / rng.choice([*FILES, MANIFEST_NAME])
    content = bytearray(path.read_bytes())
    kind = rng.choice(["flip", "flip", "truncate", "empty", "delete", "append", "extra", "swap"])
    if kind == "flip":
        place = rng.randrange(len(content))
        content[place] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    elif kind == "truncate":
        path.write_bytes(content[: rng.randrange(1, len(content))])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "delete":
        path.unlink()
    elif kind == "append":
        path.write_bytes(content + b"x")
    elif kind == "extra":
        (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(b"of another run")
    else:
        path.write_bytes(bytes(reversed(content)))
    return f"{kind} {path.name}"


def test_every_random_damage_is_found_and_an_older_checkpoint_taken(tmp_path):
    rng = random.Random(7)
    old, new = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    missed = []
    for _ in range(200):
        harm = damage(new, rng)
        said: list[str] = []
        if newest_valid(tmp_path, said.append) != old or "step_00000002" not in said[0]:
            missed.append(harm)
        shutil.rmtree(new)
        make_checkpoint(tmp_path, 2)
    assert missed == []


def test_every_single_bit_of_the_manifest_is_guarded(tmp_path):
    path = make_checkpoint(tmp_path, 1) / MANIFEST_NAME
    sound = path.read_bytes()
    for place in range(len(sound)):
        content = bytearray(sound)
        content[place] ^= 1 << (place % 8)
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            read_manifest(path.parent)


def test_nothing_sound_stops_instead_of_starting_anew(tmp_path):
    assert newest_valid(tmp_path, print) is None
    (make_checkpoint(tmp_path, 1) / MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointError, match="none is valid"):
        newest_valid(tmp_path, print)


def test_a_folder_renamed_to_another_step_is_damaged(tmp_path):
    make_checkpoint(tmp_path, 1, name=checkpoint_name(2))
    with pytest.raises(CheckpointError, match="of step 1"):
        verify_checkpoint(checkpoints_folder(tmp_path) / checkpoint_name(2))


@pytest.mark.parametrize("content", [None, "", "step_00000001", "nowhere", "\0\xff"])
def test_a_wrong_latest_is_reported_and_corrected(tmp_path, content):
    make_checkpoint(tmp_path, 1)
    newest = make_checkpoint(tmp_path, 2)
    latest = checkpoints_folder(tmp_path) / "latest"
    if content is not None:
        latest.write_text(content)
    said: list[str] = []
    check_latest(tmp_path, newest, said.append)
    assert len(said) == 1 and latest.read_text() == "step_00000002"
    check_latest(tmp_path, newest, said.append)
    assert len(said) == 1


def test_retention_keeps_newest_multiples_and_best(tmp_path):
    losses = {2: 3.0, 3: 1.0, 5: 2.0}
    for step in range(1, 9):
        make_checkpoint(tmp_path, step, eval_loss=losses.get(step))
    prune(tmp_path, keep_last=2, keep_every=4, keep_best=1)
    assert steps_of(tmp_path) == [3, 4, 7, 8]
    prune(tmp_path, keep_last=0)
    assert steps_of(tmp_path) == [3, 4, 7, 8]


def test_damaged_checkpoints_never_push_out_a_sound_one(tmp_path):
    for step in (1, 2, 3):
        make_checkpoint(tmp_path, step)
    for step in (2, 3):
        (checkpoints_folder(tmp_path) / checkpoint_name(step) / MANIFEST_NAME).unlink()
    prune(tmp_path, keep_last=1, keep_best=0)
    assert newest_valid(tmp_path, lambda message: None) == checkpoints_folder(tmp_path) / checkpoint_name(1)


def test_an_interrupted_save_is_removed_and_one_that_only_lacked_its_name_gets_it(tmp_path):
    final = checkpoints_folder(tmp_path) / checkpoint_name(4)
    make_checkpoint(tmp_path, 4, name=partial_folder(final).name)
    half = make_checkpoint(tmp_path, 5, name=partial_folder(checkpoints_folder(tmp_path) / checkpoint_name(5)).name)
    (half / MANIFEST_NAME).unlink()
    assert list_checkpoints(tmp_path) == []
    said = clear_partials(tmp_path)
    assert len(said) == 2 and steps_of(tmp_path) == [4] and not half.exists()
    verify_checkpoint(final)


def test_the_topology_free_form_goes_with_its_checkpoint(tmp_path):
    for step in (1, 2):
        make_checkpoint(tmp_path, step)
        (checkpoints_folder(tmp_path) / f"neutral_{step:08d}").mkdir()
    prune(tmp_path, keep_last=1)
    assert sorted(path.name for path in checkpoints_folder(tmp_path).iterdir()) == ["neutral_00000002", "step_00000002"]


def test_a_moved_run_is_still_sound(tmp_path):
    make_checkpoint(tmp_path / "here", 1)
    point_latest(tmp_path / "here", checkpoints_folder(tmp_path / "here") / checkpoint_name(1))
    (tmp_path / "here").rename(tmp_path / "there")
    found = newest_valid(tmp_path / "there", print)
    assert found is not None and verify_checkpoint(found).step == 1


def test_another_format_version_is_refused_by_name(tmp_path):
    folder = make_checkpoint(tmp_path, 1)
    manifest = dataclasses.replace(read_manifest(folder), format_version=99)
    (folder / MANIFEST_NAME).write_text(manifest.to_json())
    with pytest.raises(CheckpointError, match="format_version 99"):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["notes.txt", ".DS_Store", ".nfs000000000001", "thoughts/of_mine.txt"])
def test_a_strange_file_is_named_and_left_alone(tmp_path, name):
    make_checkpoint(tmp_path, 1)
    newest = make_checkpoint(tmp_path, 2)
    (newest / name).parent.mkdir(exist_ok=True)
    (newest / name).write_text("mine")
    said: list[str] = []
    assert newest_valid(tmp_path, said.append) == newest
    assert said == [f"{newest}: {name} is not of this checkpoint; left alone"] and (newest / name).exists()
    prune(tmp_path, keep_last=1, keep_best=0)
    assert steps_of(tmp_path) == [2]


def test_what_is_no_checkpoint_is_named(tmp_path):
    make_checkpoint(tmp_path, 1)
    for path, words in ((tmp_path / "nowhere", "no such folder"), (checkpoints_folder(tmp_path), "not a checkpoint")):
        with pytest.raises(CheckpointError, match=words):
            find_checkpoint(path, print)
    assert find_checkpoint(tmp_path, print) == find_checkpoint(checkpoints_folder(tmp_path) / checkpoint_name(1), print)
