"""The deepspeed launcher over two hosts with their own network: a run, a pulled cable, a killed rank, a `kill`."""

import os
import signal
import time
from pathlib import Path

import pytest
from services import BIN, are_gone, launched, ranks_of, wait_for_steps, wait_until
from training_runs import flags_for, losses, read_metrics

pytestmark = pytest.mark.cluster


@pytest.fixture
def hostfile(tmp_path) -> Path:
    path = tmp_path / "hostfile"
    path.write_text("# two hosts\n\nh1 slots=1\nh2 slots=1\n")
    return path


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """What the other host gets comes from .deepspeed_env, which may have comments and blank lines."""
    path = tmp_path / "deepspeed_env"
    path.write_text("# threads\n\nOMP_NUM_THREADS=1\n")
    return {"DS_ENV_FILE": str(path)}


def checked(hosts, hostfile: Path, *flags: str) -> list[object]:
    return hosts.on_first("launch/deepspeed", "--hostfile", hostfile, "launch/pretrain.sh", *flags)


def test_two_hosts_are_one_machine_and_values_arrive_as_typed(
    hosts, hostfile, environment, tiny_corpus, tmp_path, reference
):
    run_dir = tmp_path / "a b; $(touch pwned) 'q' \"r\" 5%n"
    output = tmp_path / "out"
    flags = flags_for(tiny_corpus, run_dir, steps=20, save_every=0, schedule="constant")
    with launched(checked(hosts, hostfile, *flags), output, **environment) as process:
        assert process.wait(240) == 0, output.read_text()
    text = output.read_text()
    assert "h1: h1    0 " in text and "h1: h2    1 " in text, text
    assert losses(run_dir) == {step: reference[step] for step in range(1, 21)}
    assert not list(tmp_path.rglob("pwned")) and not Path("/root/pwned").exists()


def test_a_pulled_cable_ends_both_sides(hosts, hostfile, environment, tiny_corpus, tmp_path):
    run_dir, output = tmp_path / "run", tmp_path / "out"
    flags = flags_for(tiny_corpus, run_dir, steps=100_000, save_every=0, timeout_minutes=0.25)
    with launched(checked(hosts, hostfile, *flags), output, **environment) as process:
        wait_for_steps(run_dir, 10, output)
        ranks = ranks_of(run_dir)
        assert sorted(ranks) == [0, 1]
        hosts.cut()
        try:
            wait_until(lambda: are_gone(list(ranks.values())), 60, output.read_text)
            assert process.wait(60) != 0
        finally:
            hosts.cut(again=True)
    text = output.read_text()
    assert "rank 0 on h1: error: " in text and "rank 1 on h2" in text, text


def test_a_killed_rank_under_the_plain_command_ends_the_other_host_s(hosts, hostfile, tiny_corpus, tmp_path):
    run_dir, output = tmp_path / "run", tmp_path / "out"
    program = [BIN / "deepspeed", "--hostfile", hostfile, "--master_addr", "h1", "launch/pretrain.sh"]
    command = hosts.on_first(*program, *flags_for(tiny_corpus, run_dir, steps=100_000, save_every=0))
    with launched(command, output) as process:
        wait_for_steps(run_dir, 3, output)
        ranks = ranks_of(run_dir)
        os.kill(ranks[1], signal.SIGKILL)
        began = time.monotonic()
        assert process.wait(60) != 0
        wait_until(lambda: are_gone(list(ranks.values())), 60, output.read_text)
        assert time.monotonic() - began < 60
    assert f"rank 0 on h1: error: rank 1 on h2 (process {ranks[1]}) died" in output.read_text()


def test_a_kill_of_the_launcher_ends_the_ranks_after_their_save(hosts, hostfile, environment, tiny_corpus, tmp_path):
    run_dir, output = tmp_path / "run", tmp_path / "out"
    flags = flags_for(tiny_corpus, run_dir, steps=100_000, save_every=0)
    with launched(checked(hosts, hostfile, *flags), output, **environment) as process:
        wait_for_steps(run_dir, 3, output)
        ranks = ranks_of(run_dir)
        process.terminate()
        assert process.wait(30) != 0
        wait_until(lambda: are_gone(list(ranks.values())), 60, output.read_text)
    saved = [path.name for path in (run_dir / "checkpoints").glob("step_*")]
    assert len(saved) == 1 and int(saved[0].removeprefix("step_")) == len(read_metrics(run_dir)), output.read_text()


def test_a_host_that_does_not_answer_and_a_name_that_is_an_option_are_refused(hosts, hostfile, tmp_path):
    hostfile.write_text("h1 slots=1\nh3 slots=1\n")
    with launched(checked(hosts, hostfile, "--steps", "1"), tmp_path / "out") as process:
        assert process.wait(60) == 2
    said = (tmp_path / "out").read_text()
    assert "error: not every host answers to ssh and has the repository: h3: " in said and "resolve" in said, said
    hostfile.write_text(f"h1 slots=1\n-oProxyCommand=touch${{IFS}}{tmp_path}/pwned slots=1\n")
    with launched(checked(hosts, hostfile, "--steps", "1"), tmp_path / "out") as process:
        assert process.wait(60) == 2
    assert "is not a host name" in (tmp_path / "out").read_text() and not (tmp_path / "pwned").exists()
