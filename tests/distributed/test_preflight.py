"""What stops a run before it begins: every difference between hosts, and ranks that do not come, in one line."""

import dataclasses
import threading
from pathlib import Path

import pytest
import torch

from minimind.distributed import preflight
from minimind.distributed.environment import RankEnvironment
from minimind.distributed.preflight import (
    announce_failure,
    examine,
    find_mismatch,
    hash_source,
    host_table,
    run_preflight,
)
from minimind.errors import OneRankError, UserError

WORLD = RankEnvironment(world_size=2)


def report(rank: int, **others) -> dict:
    own = examine(WORLD, torch.device("cpu"), Path("/r"), "f")
    return {**own, "rank": rank, "host": f"n{rank}", "torch": "2.13.0", "free_bytes": 10**12, **others}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"torch": "2.11.0"}, "torch is 2.13.0 on n0 (rank 0) and 2.11.0 on n1 (rank 1); use the same requirements"),
        ({"code": "abc"}, "and abc on n1 (rank 1); use the same revision of the repository"),
        ({"shards": "ff"}, "ff on n1 (rank 1); use the same shards"),
        ({"device_type": "cuda"}, "cuda on n1"),
        ({"free_bytes": 5}, "n1 has 5 B free"),
        ({"sees_run_folder": False}, "n1 does not see /r as n0 does"),
        ({"error": "shards /data: not there"}, "n1 (rank 1): shards /data: not there"),
    ],
)
def test_a_difference_is_one_line_that_names_the_host(change, words):
    line = find_mismatch([report(0), report(1, **change)], Path("/r"), needed_bytes=1000)
    assert line is not None and words in line and "\n" not in line


def test_equal_hosts_pass_and_stand_in_a_table():
    reports = [report(0), report(1), report(2, host="n1")]
    assert find_mismatch(reports, Path("/r"), needed_bytes=1000) is None
    rows = host_table(reports).splitlines()
    assert len(rows) == 3 and rows[2].split()[:2] == ["n1", "1-2"]


def test_what_is_the_host_s_own_is_found_out_once_on_each():
    own = examine(dataclasses.replace(WORLD, rank=1, local_rank=1), torch.device("cpu"), Path("/r"), "f")
    assert own.keys() == {"rank", "host", "device", "device_type"}
    reports = [report(0), {**own, "host": "n0"}, report(2), report(3, code="abc")]
    line = find_mismatch(reports, Path("/r"), needed_bytes=1000)
    assert line is not None and "on n0 (rank 0), n2 (rank 2) and abc on n3 (rank 3)" in line
    assert find_mismatch(reports[:3], Path("/r"), needed_bytes=1000) is None
    assert host_table(reports[:3]).splitlines()[1].split()[:2] == ["n0", "0-1"]


def test_a_limit_on_open_files_that_rank_0_would_meet_is_told_before(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "raise_open_files", lambda: 259)
    found = meet([tmp_path] * 2, {})
    assert found[0] == found[1] and "lets a process open 259 files, and rank 0 of 2 ranks needs 260" in found[0]


def test_the_source_s_hash_follows_every_change(tmp_path):
    (tmp_path / "a.py").write_text("1")
    before = hash_source(tmp_path)
    (tmp_path / "b.txt").write_text("no source")
    assert hash_source(tmp_path) == before
    (tmp_path / "a.py").rename(tmp_path / "c.py")
    assert hash_source(tmp_path) != before


def attend(store, rank: int, run_dir: Path, found: dict, change: dict, join_minutes: float = 1.0) -> None:
    env = dataclasses.replace(WORLD, rank=rank)
    own = {**examine(env, torch.device("cpu"), run_dir, "f"), **change}
    try:
        run_preflight(
            env, store, own, run_dir, needed_bytes=1, join_minutes=join_minutes, log=found.setdefault("said", []).append
        )
        found[rank] = "passed"
    except UserError as error:
        found[rank] = str(error)


def meet(run_dirs: list[Path], change: dict) -> dict:
    """Two ranks as threads, with one store."""
    store, found = torch.distributed.HashStore(), {}
    threads = [
        threading.Thread(target=attend, args=(store, rank, run_dir, found, change if rank else {}))
        for rank, run_dir in enumerate(run_dirs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_two_ranks_pass_and_leave_nothing(tmp_path):
    found = meet([tmp_path / "a" / "run"] * 2, {})
    assert (found[0], found[1]) == ("passed", "passed")
    assert list(tmp_path.iterdir()) == [] and "ranks" in found["said"][0]


def test_every_rank_stops_with_the_same_line_and_no_folder_is_left(tmp_path, monkeypatch):
    found = meet([tmp_path / "run"] * 2, {"numpy": "0.1"})
    assert found[0] == found[1] and "0.1 on" in found[0] and not (tmp_path / "run").exists()
    monkeypatch.setattr(preflight, "SIGHT_SECONDS", 0.5)
    found = meet([tmp_path / "here" / "run", tmp_path / "elsewhere"], {})
    assert found[0] == found[1] and "does not see" in found[0] and list(tmp_path.iterdir()) == []


def test_missing_failed_and_doubled_ranks_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "FAREWELL_SECONDS", 0.1)
    store, found = torch.distributed.HashStore(), {}
    attend(store, 0, tmp_path, found, {}, join_minutes=0.01)
    assert "rank 1 of 2 did not come in 0.01 minutes; here: " in found[0]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OneRankError, match="two processes call themselves rank 0"):
        own = examine(WORLD, torch.device("cpu"), tmp_path, "f")
        run_preflight(WORLD, store, own, tmp_path, needed_bytes=1, join_minutes=1, log=print)
    store, found = torch.distributed.HashStore(), {}
    announce_failure(dataclasses.replace(WORLD, rank=1), store, UserError("no shards"))
    attend(store, 0, tmp_path, found, {})
    assert found[0].endswith("(rank 1): no shards")
