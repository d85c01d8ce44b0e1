"""How long the step loop stands still for a checkpoint: written at once, and beside training.

    python benchmarks/checkpoint.py --model minimind3 --output DIR

Seconds that the loop waits for each kind of save and until the checkpoint has its name, its size, and the seconds of a
step alone and beside a save. Starts under any launcher; rank 0 prints the table and writes the JSON.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from engines import build
from measure import Claim, environment, report

from minimind.checkpoints.run_state import TrainState
from minimind.checkpoints.saving import CheckpointSaver, DataFingerprint
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import preset
from minimind.distributed.environment import find_device, read_environment
from minimind.distributed.process_group import process_group
from minimind.parallel.optimizer import optimizer_step


@dataclass
class Flags:
    """What is saved, and where."""

    model: str = "minimind3"
    """Model preset."""
    ds_config: str | None = None
    """DeepSpeed JSON [default: ZeRO stage 1]."""
    output: Path | None = None
    """Folder on the disk to measure [default: a temporary one]."""
    seq_len: int = 64
    """Tokens of a step's one sequence a rank."""
    repeats: int = 3
    """Saves of each kind."""
    report_file: Path | None = None
    """Where the JSON goes."""


def step(engine, resolved: ResolvedRun, seq_len: int) -> float:
    """One training step; its seconds."""
    began = time.perf_counter()
    tokens = torch.ones(1, seq_len, dtype=torch.int64, device=engine.device)
    engine.backward(engine(tokens, tokens).loss)
    optimizer_step(engine, resolved)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(engine, resolved: ResolvedRun, flags: Flags, *, asynchronous: bool) -> dict[str, float]:
    """Seconds of the loop's pause, until the checkpoint has its name, and of the steps meanwhile (medians)."""
    saver = CheckpointSaver(engine, resolved, DataFingerprint("", ""), asynchronous=asynchronous)
    pauses, totals, steps = [], [], []
    for repeat in range(flags.repeats + 1):  # the first only warms up: it also allocates the host copies
        began = time.perf_counter()
        saver.start(TrainState(step=repeat + 1))
        if not asynchronous:
            saver.wait()
        paused = time.perf_counter() - began
        beside = []
        while saver.is_saving:
            beside.append(step(engine, resolved, flags.seq_len))
            if saver.is_idle:
                saver.advance()
        if repeat:
            pauses.append(paused)
            totals.append(time.perf_counter() - began)
            steps += beside
    saver.close()
    result = {"pause_seconds": statistics.median(pauses), "until_named_seconds": statistics.median(totals)}
    return {**result, "step_seconds_meanwhile": statistics.median(steps)} if steps else result


def main() -> None:
    """Measure both kinds and print."""
    flags = tyro.cli(Flags)
    where = environment()
    env = read_environment()
    device = find_device(env)
    with tempfile.TemporaryDirectory(dir=flags.output) as name, process_group(env, device):
        engine, resolved = build(
            preset(flags.model),
            env,
            device,
            ds_config=flags.ds_config,
            seq_len=flags.seq_len,
            run_dir=name,
            micro_batch_size=1,
            keep_last=1,
            seed=0,
        )
        alone = statistics.median([step(engine, resolved, flags.seq_len) for _ in range(4)][1:])
        kinds = {
            "at once": measure(engine, resolved, flags, asynchronous=False),
            "beside training": measure(engine, resolved, flags, asynchronous=True),
        }
        folder = next((Path(name) / "checkpoints").glob("step_*"))
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if env.is_first:
            setting = f"{flags.model}, {env.world_size} ranks, ZeRO {resolved.zero.stage}"
            claims = [
                Claim(f"step alone, {setting}", (alone,), unit="s"),
                Claim("checkpoint", (size / 1e6,), unit="MB"),
            ]
            for kind, figures in kinds.items():
                for figure, value in figures.items():
                    claims.append(Claim(f"checkpoint {kind}: {figure.replace('_', ' ')}", (value,), unit="s"))
            report(__file__, where, claims, {"precision": resolved.train.precision}, flags.report_file)
        engine.destroy()


if __name__ == "__main__":
    main()
