"""What the benchmarks stand on: verdicts, turns, the arithmetic of larger worlds. Their figures are no tests."""

import json
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from repository import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import harness
from harness import Claim, format_table, ratios, report, time_rounds
from scaling import ACCUMULATION, COUNTS, PAGE, ROWS, STAGES, TOKENS, step_seconds, wire_bytes, write_page
from turns import Contestant, started, take_turns

from minimind.config.run_config import preset

COUNTING = "import time\nfor n in range(1, 10**6):\n    print(f'step {n}', flush=True)\n    time.sleep({pause})\n"


@pytest.mark.parametrize(
    ("values", "target", "at_least", "passed"),
    [
        ((1.0, 3.0, 9.0), 3.0, True, True),
        ((1.0, 2.9, 9.0), 3.0, True, False),
        ((5.0, 0.2, 0.1), 0.2, False, True),
        ((5.0, 0.3, 0.1), 0.2, False, False),
        ((1.0,), None, True, None),
    ],
)
def test_the_median_decides(values, target, at_least, passed):
    claim = Claim("c", values, target, at_least)
    assert claim.passed is passed
    table = format_table([claim.to_dict()])
    assert ("NOT REACHED" in table) == (passed is False) and ("pass" in table) == (passed is True)


def test_a_report_is_written_with_its_machine_and_summed_up(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(harness, "OUT", tmp_path)
    report("benchmarks/x.py", [Claim("c", ratios((4.0, 9.0), (2.0, 3.0)), 2.0), Claim("d", [1.0])], {"raw": [1]})
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["measured"] == {"raw": [1]} and "torch 2" in content["environment"]["machine"]
    assert content["claims"][0]["median"] == 2.5 and content["claims"][0]["passed"]
    assert content["environment"]["machine"] in capsys.readouterr().out
    harness.summarize(all=True)
    summary = capsys.readouterr().out
    assert "1 of 1 reached" in summary and content["environment"]["machine"] in summary and "| d |" in summary


def test_ways_are_timed_round_by_round_after_the_warm_up():
    calls = []
    seconds = time_rounds({"a": lambda: calls.append("a"), "b": lambda: time.sleep(0.01)}, 3)
    assert len(calls) == 4 and all(len(values) == 3 for values in seconds.values()) and min(seconds["b"]) > 0.01


def test_programs_take_turns_and_none_is_left():
    programs = [
        Contestant(name, [sys.executable, "-c", COUNTING.replace("{pause}", "0.02")], r"step \d+", 3)
        for name in ("a", "b")
    ]
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with started(programs, warm_steps=1):
            take_turns(programs, 2)
            pids = [program._process.pid for program in programs]
            while any(psutil.Process(pid).status() != psutil.STATUS_STOPPED for pid in pids):
                time.sleep(0.01)  # a signal is not there at once; the test's own time-out ends a wait in vain
            said = [Path(program._output.name).read_text().splitlines() for program in programs]
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    for lines in said:  # the numbers of steps go on: nothing was made twice
        assert len(lines) >= 1 + 2 * 3 and lines == [f"step {number + 1}" for number in range(len(lines))]
    for program in programs:
        assert len(program.seconds) == 2 and min(program.seconds) > 0


def test_ranks_in_sessions_of_their_own_stand_still_too():
    """As torchrun starts them."""
    code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {COUNTING!r}], start_new_session=True)"
    program = Contestant("launcher", [sys.executable, "-c", code.replace("{pause}", "0.02")], r"step \d+", 2)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with started([program], warm_steps=1):
            take_turns([program], 1)
            (rank,) = psutil.Process(program._process.pid).children()
            while rank.status() != psutil.STATUS_STOPPED:
                time.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert not rank.is_running()


def test_a_program_that_ends_early_is_named_with_its_last_words():
    program = Contestant("broken", [sys.executable, "-c", "print('step 1'); print('no more')"], r"step \d+", 1)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match=r"broken ended.*\n(.*\n)*no more"), started([program], warm_steps=2):
            pass
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_bytes_on_the_wire_follow_the_stages():
    config = preset("minimind3")
    sent = [sum(wire_bytes(config, stage, 8).values()) for stage in STAGES]
    ring = 2 * config.num_params() * 7 / 8
    # In units of a bf16 copy of the weights: an all-reduce is two, in float32 four. Stage 2 reduces at each of 4
    # micro-batches, stage 3 gathers twice at each.
    assert sent == pytest.approx([4 * ring, 3 * ring, 9 * ring, 12 * ring])
    assert sum(wire_bytes(config, 1, 8, accumulation=8).values()) == pytest.approx(3 * ring)
    assert wire_bytes(config, 3, 1) == {"gradients": 0, "weights": 0, "tokens": 0}


def test_experts_that_are_spread_reduce_less_and_exchange_tokens():
    config = preset("moe-64e")
    alone, spread = wire_bytes(config, 1, 16, 1), wire_bytes(config, 1, 16, 8)
    assert spread["gradients"] < alone["gradients"] and alone["tokens"] == 0
    layers, top_k, hidden_size = 8, 4, 512
    assert spread["tokens"] == 4 * layers * top_k * TOKENS * ACCUMULATION * hidden_size * 2 * 7 / 8


def test_the_page_of_larger_worlds_is_that_of_its_script():
    computing, small = step_seconds(preset("large"), 3, 8)
    assert step_seconds(preset("large"), 3, 1024) == (computing, pytest.approx(small, rel=20))
    page = PAGE.read_text()
    assert write_page(page) == page, "python benchmarks/scaling.py"
    assert page.count("\n| 1024 |") == 4
    # Nothing of ours stops being acceptable before 4,096 ranks, and what was counted is what the formulas say.
    counts = json.loads(COUNTS.read_text())
    for what, path, formula, most in ROWS:
        assert formula(4096) <= most, what
        for ranks in (64, 512) if path and path[0] != "start" else ():
            found = counts["now"][str(ranks)][path[0]][path[1]][path[2]]
            assert found == pytest.approx(formula(ranks), rel=0.1), what
