"""What a checkpoint remembers of its run beside tensors: the data, what decides a step's samples, how files are cut.

With these a continuation is compared. Knows nothing of engines, files or ranks.
"""

from dataclasses import dataclass
from typing import Any

import torch

from minimind.checkpoints.manifest import CheckpointError, CheckpointManifest
from minimind.config.resolved_run import ResolvedRun

_TRAINING_FIELDS = ("initializer_range", "router_aux_loss_coef", "router_z_loss_coef", "seq_aux")
RUNTIME_FIELDS = frozenset(("flash_attn", "dropout", "attention_dropout", *_TRAINING_FIELDS))
"""Fields of the model that change neither a weight nor what the model computes from them."""


@dataclass(frozen=True)
class Corpus:
    """What identifies the training data."""

    fingerprint: str
    tokenizer_sha256: str


def describe_layout(resolved: ResolvedRun) -> dict[str, Any]:
    """Settings beside ranks, stage and precision that decide what DeepSpeed's files look like."""
    zero = resolved.zero
    return {
        "optimizer": resolved.optimizer_type,
        "offload_optimizer": zero.offload_optimizer,
        "autocast": zero.autocast,
        "grad_accum_dtype": zero.grad_accum_dtype,
        "moe_backend": resolved.train.moe_backend,
        "sub_group_size": zero.sub_group_size,
        "round_robin_gradients": zero.round_robin_gradients,
        "zero_hpz_partition_size": zero.hpz_partition_size if zero.hpz_partition_size > 1 else None,
    }


def describe_sampling(resolved: ResolvedRun) -> dict[str, Any]:
    """Settings that decide, beside the shards, which samples a step takes."""
    data, train = resolved.data, resolved.train
    return {
        "seq_len": data.seq_len,
        "document_mask": data.document_mask,
        "seed": train.seed,
        "global_batch_size": train.global_batch_size,
    }


@dataclass(frozen=True)
class TrainState:
    """Where a run stands. Only what is global: anything of one rank is derived from it."""

    step: int = 0
    consumed_samples: int = 0
    tokens_seen: int = 0


def check_same_run(
    manifest: CheckpointManifest, resolved: ResolvedRun, corpus: Corpus, *, allow_data_change: bool
) -> None:
    """Refuse to continue what cannot be continued: another model, other shards, another tokenizer.

    Raises:
        CheckpointError: listing every difference.
    """
    differences = []
    model = resolved.model.to_dict()
    for key in sorted(set(model) | set(manifest.model)):
        if model.get(key) != manifest.model.get(key) and key not in RUNTIME_FIELDS:
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
