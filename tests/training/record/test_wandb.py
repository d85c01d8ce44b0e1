"""Weights & Biases: off unless asked for, one line without the package, and never the end of a training."""

import json
import sys
from pathlib import Path

import pytest
from training_runs import flags_for, read_metrics, train

from minimind.errors import UserError
from minimind.training.record import wandb as wandb_log
from minimind.training.record.wandb import WandbLog, check_wandb

# Stands in for the package: what it is given goes into a file.
PACKAGE = """
import json
from pathlib import Path

class Run:
    def __init__(self, **given):
        self.path = Path(given["dir"]) / "sent.jsonl"
        self.write({"init": {name: given[name] for name in ("project", "name", "id", "resume")},
                    "lr": given["config"]["train"]["lr"]})
    def write(self, content):
        with open(self.path, "a") as file:
            file.write(json.dumps(content) + "\\n")
    def log(self, figures, step):
        if (self.path.parent / "down").exists():
            raise OSError("no network")
        self.write({"step": step, **figures})
    def finish(self):
        self.write({"finished": True})

def init(**given):
    return Run(**given)
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield
    sys.modules.pop("wandb", None)


def sent(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "sent.jsonl").read_text().splitlines()]


def test_every_record_is_sent_and_a_resume_goes_on(tiny_corpus, tmp_path, package):
    run = tmp_path / "run"
    train(flags_for(tiny_corpus, run, wandb_project="mine", lr=1e-3, steps=4))
    first, *records, last = sent(run)
    assert first["init"]["project"] == "mine" and first["init"]["name"] == "run" and first["lr"] == 1e-3
    expected = read_metrics(run)
    assert [item["loss"] for item in records if "loss" in item] == [r["loss"] for r in expected if "loss" in r]
    assert last == {"finished": True}
    train(flags_for(tiny_corpus, run, wandb_project="mine", lr=1e-3, steps=6))
    starts = [item["init"] for item in sent(run) if "init" in item]
    assert starts[0] == starts[1] and starts[0]["resume"] == "allow"
    assert [item["step"] for item in sent(run) if "loss" in item] == [1, 2, 3, 4, 5, 6]


def test_it_is_not_imported_unless_asked_for(tiny_corpus, tmp_path, package):
    train(flags_for(tiny_corpus, tmp_path / "run", steps=1, warmup_steps=1))
    assert "wandb" not in sys.modules


def test_a_missing_package_is_one_line_before_anything_starts(tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_log.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb_project: mine needs the package wandb; pip install wandb"):
        train(flags_for(tiny_corpus, tmp_path / "run", wandb_project="mine"))
    assert not (tmp_path / "run").exists()
    check_wandb(None)


def test_a_service_that_fails_ends_nothing(tmp_path, package, capsys):
    log = WandbLog("mine", tmp_path, {"train": {"lr": 1.0}})
    (tmp_path / "down").touch()
    for step in (1, 2):
        log.log({"step": step, "loss": 1.0})
    log.close()
    assert capsys.readouterr().err == "wandb: no network; no more is sent\n"
