"""How long the step loop stands still for a checkpoint: written at once, and beside training.

python benchmarks/checkpoint.py --model minimind3 --output DIR        # under any launcher
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
import tyro
from harness import Claim, build_engine, engine_step, joined, report, time_rounds, workspace

from minimind.checkpoints.manifest import TrainState
from minimind.checkpoints.saving import CheckpointSaver, DataFingerprint
from minimind.config.run_config import preset


def main(
    model: str = "minimind3", ds_config: str | None = None, output: Path | None = None, seq_len: int = 64,
    repeats: int = 3,
) -> None:  # fmt: skip
    """Measure both kinds.

    Args:
        ds_config: DeepSpeed JSON [default: ZeRO stage 1].
        output: folder on the disk to measure [default: a temporary one].
        seq_len: tokens of a step's one sequence a rank.
    """
    with workspace(output) as folder, joined() as (env, device):
        run = {"run_dir": str(folder), "seq_len": seq_len, "micro_batch_size": 1, "keep_last": 1, "seed": 0}
        engine, resolved = build_engine(preset(model), env, device, ds_config=ds_config, **run)
        tokens = torch.ones(1, seq_len, dtype=torch.int64, device=device)
        step = engine_step([tokens], engine, resolved)
        setting = f"{model}, {env.world_size} ranks, ZeRO {resolved.zero.stage}"
        claims = [Claim(f"step alone, {setting}", time_rounds({"step": step}, 3)["step"], unit="s")]
        for beside, kind in enumerate(("at once", "beside training")):
            saver = CheckpointSaver(engine, resolved, DataFingerprint("", ""), asynchronous=bool(beside))
            found = time_saves(saver, step, repeats, wait=not beside)
            claims += [Claim(f"checkpoint {kind}: {figure}", values, unit="s") for figure, values in found.items()]
            saver.close()
        (saved, *_) = (folder / "checkpoints").glob("step_*")
        size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
        if env.is_first:
            claims.append(Claim("checkpoint", (size / 1e6,), unit="MB"))
            report(__file__, claims, {"precision": resolved.train.precision})
        engine.destroy()


def time_saves(saver: CheckpointSaver, step: Callable[[], None], repeats: int, *, wait: bool) -> dict[str, list[float]]:
    """Seconds of the loop's pause, until the checkpoint has its name, and of the steps meanwhile."""
    pauses, totals, steps = [], [], []
    for repeat in range(repeats + 1):  # the first only warms up: it also allocates the host copies
        began = time.perf_counter()
        saver.start(TrainState(step=repeat + 1))
        if wait:
            saver.wait()
        paused = time.perf_counter() - began
        beside = []
        while saver.is_saving:
            beside += time_rounds({"step": step}, 1, warm_up=0)["step"]
            if saver.is_idle:
                saver.advance()
        if repeat:
            pauses.append(paused)
            totals.append(time.perf_counter() - began)
            steps += beside
    found = {"pause seconds": pauses, "until named seconds": totals, "step seconds meanwhile": steps}
    return {name: values for name, values in found.items() if values}


if __name__ == "__main__":
    tyro.cli(main)
