"""The scripts and two ranks run where /proc is empty, tools are POSIX's alone and processes start by spawn."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT
from structured_corpus import write_corpus
from test_quickstart import repository  # noqa: F401 - its scripts with stubs

BARE = [sys.executable, str(ROOT / "tests" / "support" / "bare_machine")]


def run_bare(command: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [*BARE, *command], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if "unshare" in done.stderr:  # a container may forbid them, and nothing else hides /proc from a process
        pytest.skip(f"no mount namespaces here: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_quickstart_needs_no_other_tools(repository, tmp_path):  # noqa: F811
    said = run_bare(["bash", "launch/quickstart.sh"], repository, LOG=str(tmp_path / "log"))
    assert ".venv is up to date" in said and "Done. What you have now:" in said
    assert len((tmp_path / "log").read_text().splitlines()) > 8


def test_a_corpus_of_standard_input_and_two_ranks(tmp_path):
    program = "from minimind import host; print(host.sys.platform, (host.PROC / 'self').exists())"
    assert run_bare([sys.executable, "-c", program], ROOT).split() == ["darwin", "False"]
    corpus = write_corpus(tmp_path / "corpus", tokens=4_000, val_tokens=200)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"a line of text, number {place}"}) + "\n" for place in range(300)))
    prepared = '"$0" -m data_prep.train_tokenizer --input "$1" --output "$2/tokenizer" --vocab-size 300 && '
    prepared += (
        '"$0" -m data_prep.tokenize_corpus --input - --format jsonl --tokenizer "$2/tokenizer" --output "$2/shards" '
    )
    prepared += '--workers 2 <"$1"'
    run_bare(["bash", "-c", prepared, sys.executable, str(text), str(tmp_path)], ROOT)
    manifest = json.loads((tmp_path / "shards" / "train" / "manifest.json").read_text())
    assert manifest["total_documents"] > 290
    flags = ["--model", "tiny", "--shards", str(corpus), "--run-dir", str(tmp_path / "run")]
    flags += ["--steps", "2", "--seq-len", "32", "--global-batch-size", "4", "--no-tensorboard"]
    run_bare(
        ["env", "-u", "OMP_NUM_THREADS", "bash", "launch/pretrain.sh", *flags],
        ROOT,
        NUM_RANKS="2",
        MINIMIND_PYTHON=sys.executable,
    )
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps if "loss" in step] == [1, 2]
    assert (tmp_path / "run" / "checkpoints" / "step_00000002").is_dir()
