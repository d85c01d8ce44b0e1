"""A process that trains small models and says what it held: for tests/reports/plan/test_memory_measured.py.

python tests/support/memory_trial.py < cases.json       a line of JSON for each case
"""

import dataclasses
import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from repository import ROOT

sys.path.insert(0, str(ROOT))

import torch

from minimind.config.resolve import resolve_run
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import DataConfig, RunConfig, TrainConfig
from minimind.distributed.environment import find_device, read_environment
from minimind.distributed.process_group import process_group
from minimind.model.presets import PRESETS
from minimind.reports.plan import trial
from minimind.training import trainer


def resolve_case(case: dict[str, Any], device_type: str, world_size: int = 1) -> ResolvedRun:
    """The run of a case: {preset, model, stage, zero, seq_len, train}."""
    ds = json.loads((ROOT / "ds_configs" / f"zero{case['stage']}.json").read_text())
    ds["zero_optimization"].update(case.get("zero", {}))
    run = RunConfig(
        model=dataclasses.replace(PRESETS[case["preset"]], **case.get("model", {})),
        data=DataConfig(seq_len=case["seq_len"]),
        train=TrainConfig(**{"optimizer": "adamw", **case["train"]}),
    )
    return resolve_run(
        run, ds, world_size=world_size, num_samples=1_000_000, device_type=device_type, bf16_supported=True
    )


def measure(case: dict[str, Any]) -> dict[str, int]:
    """Bytes held beyond the start: before the update (states), and at the peak of a step."""
    env = read_environment()
    device = find_device(env)
    resolved = resolve_case(case, device.type, env.world_size)
    # Libraries load, kernels are made, and oneDNN takes room for its largest matrix; in bf16 small ones, as DeepSpeed's
    # BF16 optimizer is never given back.
    small = {**case.get("model", {}), "num_hidden_layers": 1}
    if resolved.train.precision != "fp32":
        small |= {"hidden_size": 64, "vocab_size": 512}
    _train(resolve_case({**case, "model": small}, device.type, env.world_size), env, device, {})
    gc.collect()
    base, found = trial.held_bytes(device), {}
    _train(resolved, env, device, found)
    return {name: value - base for name, value in found.items()}


def _settled_bytes(device: torch.device) -> int:
    """The least held in half a second: gloo's thread drops a reduced buffer only after it has said that it is done."""
    readings = []
    for _ in range(10):
        time.sleep(0.05)
        readings.append(trial.held_bytes(device))
    return min(readings)


def _train(resolved: ResolvedRun, env: Any, device: torch.device, found: dict[str, int]) -> None:
    real_step = trainer.optimizer_step

    def step(engine: Any, resolved: ResolvedRun) -> Any:
        found["states"] = _settled_bytes(device)
        return real_step(engine, resolved)

    trainer.optimizer_step = step
    try:
        with tempfile.TemporaryDirectory() as folder:
            made = trial.make_trainer(resolved, env, device, Path(folder))
            for number in range(2):
                if number == 1:  # the first step has made the optimizer's states
                    trial.reset_peak(device)
                made.train_step(made.loader.step_batches(number))
            found["peak"] = trial.peak_bytes(device)
            made.engine.destroy()
    finally:
        trainer.optimizer_step = real_step


if __name__ == "__main__":
    environment = read_environment()
    trial.return_freed_memory()
    with process_group(environment, find_device(environment)):
        for line in json.load(sys.stdin):
            result = measure(line)
            if environment.is_first:
                print(json.dumps(result), flush=True)
