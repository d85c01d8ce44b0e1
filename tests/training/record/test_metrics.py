"""The record of a run: every step once, whatever happened before; readable by any JSON reader."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minimind.errors import UserError
from minimind.training.record import progress, run_files
from minimind.training.record.events import read_events
from minimind.training.record.metrics import RunRecord
from minimind.training.record.run_files import METRICS_NAME, evaluations_of, keep_until, read_records, steps_of
from minimind.training.step_record import peak_memory_bytes


def record(step: int, **values) -> dict:
    speed = {"tokens_per_second": 1000.0, "step_seconds": 0.1}
    return {"step": step, "loss": 1.0 / step, "lr": 1e-3, "grad_norm": 2.0, **speed, **values}


def evaluation(step: int) -> dict:
    return {"step": step, "eval_loss": 1.5, "eval_bits_per_byte": 0.7, "eval_perplexity": 4.5}


def lines(run_dir: Path) -> list[dict]:
    def refuse(name: str):
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run_dir / METRICS_NAME).read_text().splitlines()]


def test_steps_and_evaluations_are_written_at_once_and_shown(tmp_path, capsys):
    log = RunRecord(tmp_path / "run", 0, 3, peak_tokens_per_second=2500.0, tensorboard=False)
    log.log_step(record(1))
    assert [line["step"] for line in lines(tmp_path / "run")] == [1], "a line waits in a buffer"
    log.log_step(record(2))
    log.log_evaluation(evaluation(2))
    log.log_step(record(3))
    log.close()
    log.close()
    assert [(line["step"], "eval_loss" in line) for line in lines(tmp_path / "run")] == [
        (1, False), (2, False), (2, True), (3, False)
    ]  # fmt: skip
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "step 1/3  loss 1.0000  lr 1.00e-03  1,000 tok/s  MFU 40.0%"
    assert printed[1] == "step 2  eval loss 1.5000  bits/byte 0.7000  perplexity 4.50"
    assert printed[2].startswith("step 3/3  loss 0.3333") and len(printed) == 3


def test_a_resume_takes_out_what_is_about_to_happen_again(tmp_path):
    log = RunRecord(tmp_path, 0, 9, tensorboard=False)
    for step in (1, 2, 3, 4):
        log.log_step(record(step, loss=9.0))
        if step % 2 == 0:
            log.log_evaluation(evaluation(step))
    log.close()
    resumed = RunRecord(tmp_path, 2, 9, tensorboard=False)
    resumed.log_step(record(3, loss=8.0))
    resumed.close()
    assert [(line["step"], line.get("loss", "eval")) for line in lines(tmp_path)] == [
        (1, 9.0), (2, 9.0), (2, "eval"), (3, 8.0)
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_NAME], "a temporary file was left"


def test_a_damaged_file_loses_only_its_damaged_lines(tmp_path):
    path = tmp_path / METRICS_NAME
    whole = json.dumps(record(1)) + "\n"
    path.write_bytes(
        whole.encode()
        + b'{"step": null}\n[1]\n\n\xff\xfe\x00\n{"loss": 1}\n{"step": "2"}\n'
        + json.dumps(record(2)).encode()  # cut: no end of line
    )
    with open(path, "ab") as file:
        file.write(b'\n{"step": 3, "eval_loss": 2.5, "eval_')
    assert [item["step"] for item in steps_of(read_records(path))] == [1, 2]
    assert evaluations_of(read_records(path)) == []
    keep_until(path, 5)
    assert path.read_bytes().startswith(whole.encode()) and path.read_text(errors="replace").endswith(
        json.dumps(record(2)) + "\n"
    )
    assert [item["step"] for item in read_records(path)] == [1, 2]
    keep_until(tmp_path / "nothing", 5)
    assert not (tmp_path / "nothing").exists()


def test_the_end_of_a_long_file_is_enough(tmp_path, monkeypatch):
    path = tmp_path / METRICS_NAME
    line = json.dumps(record(10**6, note="x" * 300))
    path.write_text("".join(line.replace("1000000", str(step)) + "\n" for step in range(1, 10_001)))
    size, read = path.stat().st_size, []
    parse = run_files._parse
    monkeypatch.setattr(run_files, "_parse", lambda line: read.append(len(line)) or parse(line))
    assert keep_until(path, 9_990) == 10_000 and sum(read) < size / 2
    assert steps_of(read_records(path, 2000))[-1]["step"] == 9_990
    assert keep_until(path, 5) == 9_990 and [item["step"] for item in read_records(path)] == [1, 2, 3, 4, 5]
    assert keep_until(path, 0) == 5 and path.read_bytes() == b""


def test_the_load_of_many_experts_is_not_in_every_line(tmp_path):
    log = RunRecord(tmp_path, 0, 200, tensorboard=False)
    loads, balance = [[200] * 256, [50] * 255 + [0]], {"min": [1, 0]}
    for step in range(1, 121):
        log.log_step(record(step, expert_load=loads, expert_balance=balance, load_entropy=1.0))
    log.close()
    written = read_records(tmp_path / METRICS_NAME)
    assert [item["step"] for item in written if "expert_load" in item or "expert_balance" in item] == [50, 100]
    assert written[49]["expert_load"] == loads and all(item["load_entropy"] == 1.0 for item in written)
    alarms = [event for event in read_events(tmp_path) if event.kind == "dying_expert"]
    assert [event.step for event in alarms] == [50] and "expert 255 of expert layer 1" in alarms[0].message


def test_no_nan_and_no_infinity_reaches_the_json(tmp_path):
    log = RunRecord(tmp_path, 0, 3, tensorboard=False)
    log.log_step(record(1, loss=float("nan"), grad_norm=float("inf")))
    log.close()
    assert (lines(tmp_path)[0]["loss"], lines(tmp_path)[0]["grad_norm"]) == ("nan", "inf")
    assert lines(tmp_path)[0]["mfu"] is None
    assert read_records(tmp_path / METRICS_NAME) == [{**record(1), "loss": None, "grad_norm": None, "mfu": None}]


def test_tensorboard_has_every_figure_and_a_resume_purges(tmp_path):
    log = RunRecord(tmp_path, 0, 4, peak_tokens_per_second=2500.0)
    for step in (1, 2, 3):
        read = {"data_seconds": 0.1} if step == 2 else {}
        log.log_step(record(step, loss_scale=65536.0, peak_memory_bytes=10, expert_load=[[3, 1], [2, 2]], **read))
    log.log_evaluation(evaluation(3))
    log.close()
    log = RunRecord(tmp_path, 2, 4)
    log.log_step(record(3, loss=7.0))
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    expected = {
        "train/loss", "train/lr", "train/grad_norm", "train/loss_scale", "eval/loss", "speed/tokens_per_second",
        "speed/mfu", "speed/step_seconds", "memory/peak_bytes",
    }  # fmt: skip
    assert expected <= set(events.Tags()["scalars"])
    assert events.Tags()["histograms"] == ["experts/load_0", "experts/load_1"]
    assert [event.step for event in events.Histograms("experts/load_0")] == [2], "one for each reading of the device"
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5), (3, 7.0)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_line_and_closing_does_not_hide_it(tmp_path):
    log = RunRecord(tmp_path, 0, 3, tensorboard=False)
    (tmp_path / METRICS_NAME).unlink(missing_ok=True)
    (tmp_path / METRICS_NAME).symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"metrics.jsonl: No space left on device; free disk space and resume"):
        log.log_step(record(1))
    log.close()


def test_lines_come_now_and_then_where_there_is_no_terminal(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    log = RunRecord(tmp_path, 0, 100, tensorboard=False)
    for step in range(1, 101):
        now[0] += 1.0
        log.log_step(record(step))
    log.close()
    printed = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert printed == [f"{step}/100" for step in (1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100)]


def test_a_terminal_gets_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    log = RunRecord(tmp_path, 2, 4, peak_tokens_per_second=2500.0, tensorboard=False)
    log.log_step(record(3))
    log.log("between")
    log.log_step(record(4))
    log.close()
    out, err = capsys.readouterr()
    assert "between" in out + err
    last = err.split("\r")[-1]
    assert "4/4" in last and "loss 0.2500" in last and "MFU 40.0%" in last


def test_peak_memory_of_this_process():
    assert peak_memory_bytes(torch.device("cpu")) > 50 * 2**20
