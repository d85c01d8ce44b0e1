"""What identifies a run in its checkpoints, and what a continuation may change."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch

from minimind.checkpoints.manifest import CheckpointError, CheckpointManifest
from minimind.config.resolved_run import ResolvedRun
from minimind.model.config import ModelConfig

Change = Literal["fixed", "topology", "free", "silent"]

_SAMPLING = ("seq_len", "document_mask", "seed", "global_batch_size")
_LAYOUT = (
    "optimizer", "offload_optimizer", "autocast", "grad_accum_dtype", "moe_backend", "sub_group_size",
    "round_robin_gradients", "zero_hpz_partition_size",
)  # fmt: skip
AT_RESUME: dict[str, Change] = {
    # Which weights there are and what the model computes from them...
    **dict.fromkeys((field.name for field in dataclasses.fields(ModelConfig)), "fixed"),
    # ...but for what only training reads, or what gives the same values in another way.
    **dict.fromkeys(("flash_attn", "dropout", "attention_dropout", "initializer_range"), "free"),
    **dict.fromkeys(("router_aux_loss_coef", "router_z_loss_coef", "seq_aux", "aux_loss_scope"), "free"),
    # How DeepSpeed's files are cut: the portable form carries the state over.
    **dict.fromkeys(("world_size", "zero_stage", "ep_size", "precision", *_LAYOUT), "topology"),
    # Which samples a step takes, and what the optimizer's state means.
    **dict.fromkeys((*_SAMPLING, "optimizer"), "fixed"),
    **dict.fromkeys(("run_dir", "resume", "shards", "ds_config", "num_workers", "timeout_minutes"), "silent"),
    **dict.fromkeys(("log_every", "tensorboard", "wandb_project", "preflight", "profile_steps"), "silent"),
}
"""What a continuation may change. fixed: with another value it is another run. topology: through the portable form.
free (every setting that is not here): noted in the log. silent: not worth a log line."""


@dataclass(frozen=True)
class DataFingerprint:
    """What identifies the training data."""

    fingerprint: str
    tokenizer_sha256: str


def describe_layout(resolved: ResolvedRun) -> dict[str, Any]:
    """Settings beside ranks, stage and precision that decide what DeepSpeed's files look like."""
    values = {
        **vars(resolved.zero),
        "optimizer": resolved.optimizer_type,
        "moe_backend": resolved.train.moe_backend,
        # The manifest has always had null where there is no second copy.
        "zero_hpz_partition_size": resolved.zero.hpz_partition_size if resolved.zero.hpz_partition_size > 1 else None,
    }
    return {name: values[name] for name in _LAYOUT}


def describe_sampling(resolved: ResolvedRun) -> dict[str, Any]:
    """Settings that decide, beside the shards, which samples a step takes."""
    values = {**vars(resolved.data), **vars(resolved.train)}
    return {name: values[name] for name in _SAMPLING}


@dataclass(frozen=True)
class TrainState:
    """Progress of a run. Global figures only: anything of one rank is derived from them."""

    step: int = 0
    consumed_samples: int = 0
    tokens_seen: int = 0
    data_start_step: int = 0
    """Steps done when the present shards came in: 0, or where --allow-data-change was first used with them."""


def check_same_run(
    manifest: CheckpointManifest, resolved: ResolvedRun, corpus: DataFingerprint, *, allow_data_change: bool
) -> None:
    """Refuse to continue what cannot be continued: another model, other shards, another tokenizer.

    Raises:
        CheckpointError: listing every difference.
    """
    differences = []
    model = resolved.model.to_dict()
    for key in sorted(set(model) | set(manifest.model)):
        if model.get(key) != manifest.model.get(key) and AT_RESUME.get(key, "fixed") == "fixed":
            differences.append(f"{key} {manifest.model.get(key)!r} there, {model.get(key)!r} here")
    for key, value in describe_sampling(resolved).items():
        if value != manifest.sampling.get(key, value):
            differences.append(f"{key} {manifest.sampling[key]!r} there, {value!r} here")
    if manifest.tokenizer_sha256 != corpus.tokenizer_sha256:
        differences.append(f"tokenizer {manifest.tokenizer_sha256[:12]} there, {corpus.tokenizer_sha256[:12]} here")
    elif manifest.shard_fingerprint != corpus.fingerprint and not allow_data_change:
        differences.append(
            f"shards {manifest.shard_fingerprint[:12]} there, {corpus.fingerprint[:12]} here (--allow-data-change if "
            "that is meant)"
        )
    if differences:
        raise CheckpointError(f"checkpoint of step {manifest.step}: cannot continue this run: {'; '.join(differences)}")


def changes_topology(manifest: CheckpointManifest, resolved: ResolvedRun) -> list[str]:
    """What about the ranks, the stage and DeepSpeed's layout is not as it was; nothing: DeepSpeed's files fit."""
    there = {
        "world_size": manifest.world_size,
        "zero_stage": manifest.zero_stage,
        "ep_size": manifest.ep_size,
        "precision": manifest.precision,
        **manifest.layout,
    }
    here = {
        "world_size": torch.distributed.get_world_size(),
        "zero_stage": resolved.zero.stage,
        "ep_size": resolved.train.ep_size,
        "precision": resolved.train.precision,
        **describe_layout(resolved),
    }
    return [f"{key} {there.get(key)} -> {here.get(key)}" for key in here if there.get(key) != here.get(key)]
