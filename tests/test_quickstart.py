"""The quickstart's number of steps follows the machine and the time that is left, and stays what it was."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from repository import ROOT

sys.path.insert(0, str(ROOT / "launch"))
from quickstart_steps import FEWEST, MODEL, MOST, SEQ_LEN, WINDOWS, choose_steps

# Stands for Python and for launch/pretrain.sh: writes down what is called, and makes the files that are looked for.
STUB = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$LOG"
case "$*" in
  *quickstart_steps.py*) [ -z "${FAIL:-}" ] && echo 140 bf16 ;;
  *default_corpus*) mkdir -p data/quickstart && touch data/quickstart/corpus.jsonl ;;
esac
"""


def test_steps_fill_the_time_between_their_bounds() -> None:
    assert choose_steps(400, 1.0) == 320 and choose_steps(400, 0.5) == 660
    assert choose_steps(400, 0.001) == MOST and choose_steps(400, 100.0) == FEWEST


def test_the_machine_is_measured_in_about_a_second() -> None:
    command = [sys.executable, "launch/quickstart_steps.py", "400"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    steps, *precision = done.stdout.split()
    assert done.stderr == "" and FEWEST <= int(steps) <= MOST and int(steps) % 20 == 0
    assert precision in ([["fp32"], ["bf16"]] if not torch.cuda.is_available() else [[]])


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The quickstart's scripts and files, with stubs for all that it runs."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    for path in (tmp_path / ".venv/bin/python", tmp_path / "launch/pretrain.sh", tmp_path / "launch/sft.sh"):
        path.write_text(STUB)
        path.chmod(0o755)
    files = [Path(shutil.copy(path, tmp_path)) for path in sorted(ROOT.glob("requirements*.txt"))]
    stamp = tmp_path / ".venv" / ".installed-requirements"
    stamp.write_text("".join(path.read_text() for path in files))
    return tmp_path


def run(repository: Path, **environment: str) -> tuple["subprocess.CompletedProcess[str]", list[str]]:
    log = repository / "log"
    log.unlink(missing_ok=True)
    environment = {**os.environ, "LOG": str(log), **environment}
    command = ["bash", "launch/quickstart.sh"]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)
    return done, log.read_text().splitlines()


def test_the_chosen_number_is_said_and_kept(repository: Path) -> None:
    done, calls = run(repository)
    assert done.returncode == 0, done.stderr
    assert "140 steps, at most 6 minutes here, and a fifth of it to fine-tune it" in done.stdout
    (trained,) = [call for call in calls if call.startswith("pretrain.sh")]
    shape = {"hidden-size": MODEL.hidden_size, "seq-len": SEQ_LEN, "global-batch-size": WINDOWS}
    for name, value in {"steps": 140, "precision": "bf16", **shape}.items():
        assert f"--{name} {value} " in trained, "another step than was measured"
    (measured,) = [call for call in calls if "quickstart_steps.py" in call]
    assert 347 <= int(measured.split()[-1]) <= 362
    assert any(call.startswith("sft.sh") and "--steps 56 " in call for call in calls)
    done, calls = run(repository)  # goes on with the same number, whatever time is left
    assert not any("quickstart_steps.py" in call for call in calls)
    assert any("--steps 140 " in call and "--precision bf16" in call for call in calls)
    done, calls = run(repository, QUICKSTART_STEPS="20")
    assert any("--steps 20 " in call for call in calls) and any("--steps 8 " in call for call in calls)
    assert not any("--precision" in call for call in calls)


def test_what_has_changed_is_shown_and_counted(tmp_path: Path) -> None:
    def write(name: str, *answers: str) -> Path:
        kinds = [("next", True), ("next", True), ("documentation", False)]
        lines = [
            {
                "messages": [{"role": "user", "content": f"q{place}"}, {"role": "assistant", "content": "7"}],
                "kind": kind, "is_held_out": held_out, "response": {"role": "assistant", "content": answer},
            }
            for place, ((kind, held_out), answer) in enumerate(zip(kinds, answers, strict=True))
        ]  # fmt: skip
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path / name

    files = [write("before.jsonl", "x " * 50, "7 ", "7"), write("after.jsonl", "7", "7", "8")]
    command = [sys.executable, "launch/quickstart_answers.py", *map(str, files)]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.strip() for line in shown] == [
        "q0", "before  " + "x " * 30 + " ...", "after   7", "q2", "before  7", "after   8",
        "held-out questions answered exactly, before and after:", "next    1 and 2 of 2",
    ]  # fmt: skip


def test_a_machine_that_cannot_be_measured_is_one_line(repository: Path) -> None:
    done, calls = run(repository, FAIL="1")
    assert done.returncode == 1 and "error: the speed of this machine could not be measured" in done.stderr
    assert not any(call.startswith("pretrain.sh") for call in calls)
