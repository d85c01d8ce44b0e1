"""An engine as `minimind.train` builds it, for benchmarks that make their own steps on it. Measures nothing."""

from typing import Any

import deepspeed
import torch
from measure import ROOT

from minimind.config.resolve import load_ds_config, resolve_run
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import DataConfig, RunConfig, TrainConfig
from minimind.distributed.environment import RankEnvironment
from minimind.model.config import ModelConfig
from minimind.parallel.engine import build_engine, build_model


def build(
    model: ModelConfig,
    env: RankEnvironment,
    device: torch.device,
    *,
    ds_config: str | None = None,
    stage: int = 1,
    seq_len: int,
    **train: Any,
) -> tuple[deepspeed.DeepSpeedEngine, ResolvedRun]:
    """The engine and its resolved run, under our JSON of `stage` or another `ds_config`.

    `train`: fields of TrainConfig. Every rank calls this, inside a process group.
    """
    resolved = resolve_run(
        RunConfig(model=model, data=DataConfig(seq_len=seq_len), train=TrainConfig(**train)),
        load_ds_config(ds_config or str(ROOT / "ds_configs" / f"zero{stage}.json")),
        dp_size=env.world_size,
        local_world_size=env.local_world_size,
        device_type=device.type,
        bf16_supported=device.type == "cuda" and torch.cuda.is_bf16_supported(),
    )
    return build_engine(resolved, build_model(resolved, device)), resolved
