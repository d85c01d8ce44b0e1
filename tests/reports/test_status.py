"""The status of runs from their folders alone: while they write, finished, stopped, failed, crashed, never started."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from training_runs import flags_for, train

from minimind import status
from minimind.errors import UserError
from minimind.reports.status import describe_trend, read_status
from minimind.training.record.events import write_event
from minimind.training.record.run_files import read_records


def write_run(folder: Path, steps: int = 40, total: int = 100, *, cut: bool = False, **values: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "run_config.json").write_text(json.dumps({"train": {"steps": total}}))
    records = [
        {"step": i, "loss": 5.0 - i / 20, "tokens_per_second": 1234.5, "mfu": 0.25, "step_seconds": 2.0, **values}
        for i in range(1, steps + 1)
    ]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text + ('{"step": 41, "lo' if cut else ""))
    write_event(folder, "start", 0, "started")
    return folder


def lines(capsys, *args: str) -> tuple[int, list[str]]:
    code = status.main(list(args))
    return code, capsys.readouterr().out.splitlines()


def test_a_run_that_writes_at_this_moment(tmp_path, capsys):
    run = write_run(tmp_path / "live", cut=True)
    (run / "run.lock").write_text("{}")
    (run / "checkpoints" / "step_00000030").mkdir(parents=True)
    code, (head, line) = lines(capsys, str(run))
    assert code == 0 and head.split()[:4] == ["run", "state", "step", "loss"]
    assert line.split() == [
        "live", "running", "40/100", "3.0000", "falling", "1,234", "25.0%", "2:00", "30", "ok"
    ]  # fmt: skip


def test_a_crash_is_told_from_an_end(tmp_path, capsys):
    run = write_run(tmp_path / "dead")
    (run / "run.lock").write_text("{}")
    old = time.time() - 3600
    for name in ("run.lock", "metrics.jsonl"):
        os.utime(run / name, (old, old))
    code, (_, line) = lines(capsys, str(run))
    assert code == 1 and "crashed" in line and line.endswith("the same command continues it") and "ETA" not in line
    (run / "run.lock").unlink()
    assert read_status(run).state == "crashed"
    write_event(run, "fail", 40, "step 40: loss is nan")
    assert (read_status(run).state, read_status(run).health) == ("failed", "step 40: loss is nan")
    write_event(run, "resume", 30, "resumed")
    write_event(run, "stop", 40, "stopped by SIGTERM")
    assert read_status(run).state == "stopped"


def test_alarms_since_the_last_start_are_the_health(tmp_path):
    run = write_run(tmp_path / "run")
    write_event(run, "alarm", 12, "jumped", "loss_spike")
    write_event(run, "alarm", 30, "slow", "throughput")
    assert read_status(run).health == "loss_spike at step 12; throughput at step 30"
    write_event(run, "resume", 35, "resumed")
    assert read_status(run).health == "ok"


def test_what_was_never_started_and_what_is_no_folder(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    code, (_, line) = lines(capsys, str(tmp_path / "empty"))
    assert code == 0 and line.split() == ["empty", "never", "started"]
    with pytest.raises(UserError, match="no such folder"):
        status.main([str(tmp_path / "nothing")])
    with pytest.raises(UserError):
        status.main([])


def test_a_folder_of_runs_is_all_of_them(tmp_path, capsys):
    for name in ("b", "a"):
        write_run(tmp_path / name)
    _, (_, first, second) = lines(capsys, str(tmp_path))
    assert (first.split()[0], second.split()[0]) == ("a", "b")


def test_only_the_end_of_a_long_file_is_read(tmp_path):
    run = write_run(tmp_path / "long", steps=5000)
    tail = read_records(run / "metrics.jsonl", 2000)
    assert 5 < len(tail) < 30 and tail[-1]["step"] == 5000
    assert len(read_records(run / "metrics.jsonl", 10**9)) == 5000


def test_the_trend_is_more_than_noise():
    def trend(*losses: float) -> str:
        return describe_trend([{"step": i, "loss": loss} for i, loss in enumerate(losses)])

    assert trend(*(3 - i / 10 for i in range(20))) == "falling"
    assert trend(*(3 + i / 10 for i in range(20))) == "rising"
    assert trend(*(3 + (-1) ** i for i in range(20))) == "flat"
    assert trend(3, 2) == "" and describe_trend([{"step": 1, "loss": None}] * 50) == ""


def test_a_real_run_from_start_to_end(tiny_corpus, tmp_path, capsys):
    train(flags_for(tiny_corpus, tmp_path / "run"))
    code, (_, line) = lines(capsys, str(tmp_path / "run"))
    assert code == 0 and line.split()[:3] == ["run", "finished", "6/6"] and line.split()[-2:] == ["6", "ok"]
