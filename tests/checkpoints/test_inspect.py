"""DeepSpeed's own tools on our folders: its script for float32 weights, its universal conversion, its plain load."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import EXPERTS, RankPool, flags_for, losses, rank_pool, train, weights

from minimind.checkpoints.folder import checkpoints_folder, list_checkpoints
from minimind.config.command_line import parse_command_line
from minimind.config.deepspeed_file import load_ds_config
from minimind.config.resolve import resolve_run
from minimind.config.resolved_run import ResolvedRun
from minimind.distributed.environment import read_environment
from minimind.distributed.process_group import process_group
from minimind.parallel.engine import build_engine, build_model
from minimind.parallel.optimizer import optimizer_step

CPU = torch.device("cpu")
# DeepSpeed's universal form carries parameters and no buffers, so the selection biases of the routers are lost in it.
UNBIASED = {**EXPERTS, "router_bias_update_rate": 0.0}


@pytest.fixture(scope="module")
def pool():
    yield from rank_pool(2)


def run_tool(module: str, *args: object) -> None:
    command = [sys.executable, "-m", f"deepspeed.{module}", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-1000:]


@pytest.mark.parametrize("stage", [1, 3])
def test_zero_to_fp32_reads_the_folder(tiny_corpus, tmp_path, pool: RankPool, stage):
    pool.run(train, flags_for(tiny_corpus, tmp_path / "run", stage=stage, steps=2))
    run_tool("utils.zero_to_fp32", checkpoints_folder(tmp_path / "run"), tmp_path / "out")  # by `latest`
    theirs = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    ours = weights(tmp_path / "run")
    assert theirs.keys() - {"lm_head.weight"} == ours.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


def load_with_deepspeed(flags: list[str], folder: str, *, universal: bool = False, steps: int = 2) -> list[float]:
    """An engine as any script would make it, its own `load_checkpoint`, and the losses of the steps after it."""
    command = parse_command_line(flags)
    env = read_environment()
    torch.set_num_threads(1)
    resolved = resolve_run(command.run, load_ds_config(command.run.train.ds_config), world_size=env.world_size)
    if universal:
        resolved = dataclasses.replace(resolved, ds={**resolved.ds, "checkpoint": {"load_universal": True}})
    with process_group(env, CPU):
        engine = build_engine(resolved, build_model(resolved, CPU))
        path, _ = engine.load_checkpoint(folder)
        assert path is not None
        found = [take_step(engine, resolved, step) for step in range(steps)]
        engine.destroy()
    return found


def take_step(engine, resolved: ResolvedRun, step: int) -> float:
    """One step on a batch that every number of ranks shares out alike."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(3, 256, (4, 17), generator=generator)
    world_size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    total = torch.zeros(())
    own = tokens[rank::world_size].split(1)
    for row in own:
        loss = engine(row[:, :-1], row[:, 1:]).loss
        total += loss.detach() / 4
        engine.backward(loss)
        if row is not own[-1]:
            engine.step()
    optimizer_step(engine, resolved)
    torch.distributed.all_reduce(total)
    return float(total)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_plain_load_continues(tiny_corpus, tmp_path, pool: RankPool, stage):
    flags = flags_for(tiny_corpus, tmp_path / "run", stage=stage, steps=2)
    pool.run(train, flags)
    first, second = pool.run(load_with_deepspeed, flags, str(checkpoints_folder(tmp_path / "run")))
    assert first == second
    # Losses of another beginning would be those of fresh weights: the loaded ones have been trained.
    assert first[0] != pytest.approx(losses(tmp_path / "run")[1], abs=1e-3)


def convert(run_dir: Path, output: Path) -> str:
    """DeepSpeed's universal form of a run's newest checkpoint; the folder for `load_checkpoint`."""
    folders = ["--input_folder", list_checkpoints(run_dir)[-1], "--output_folder", output / "universal"]
    # In a process of its own: it forks, which in one that has run threads may wait for ever.
    run_tool("checkpoint.ds_to_universal", *folders, "--num_extract_workers", 1)
    return str(output)


@pytest.mark.parametrize(
    ("stage", "kind"), [(1, {}), (3, {}), (1, UNBIASED), (2, UNBIASED), (3, UNBIASED)], ids=lambda value: str(value)[:9]
)
def test_the_universal_conversion_goes_from_two_ranks_to_one_and_back(tiny_corpus, tmp_path, pool, stage, kind):
    ep_2 = {"ep_size": 2} if kind else {}
    two = flags_for(tiny_corpus, tmp_path / "two", stage=stage, steps=2, **kind, **ep_2)
    one = flags_for(tiny_corpus, tmp_path / "one", stage=stage, steps=2, **kind)
    pool.run(train, two)
    train(one)
    for flags, run_dir in ((two, tmp_path / "two"), (one, tmp_path / "one")):
        universal = convert(run_dir, tmp_path / f"{run_dir.name}-universal")
        if flags is two:
            expected = pool.run(load_with_deepspeed, flags, str(checkpoints_folder(run_dir)))[0]
            found = load_with_deepspeed(one, universal, universal=True)
        else:
            expected = load_with_deepspeed(flags, str(checkpoints_folder(run_dir)))
            found = pool.run(load_universal, two, universal)[0]
        assert found == pytest.approx(expected, rel=1e-5)


def load_universal(flags: list[str], folder: str) -> list[float]:
    return load_with_deepspeed(flags, folder, universal=True)
