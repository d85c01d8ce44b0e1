"""What identifies a run in its checkpoints, and what a continuation may change."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from minimind.checkpoints.base import describe_base
from minimind.checkpoints.manifest import CheckpointManifest
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import TrainConfig
from minimind.model.config import ModelConfig
from minimind.model.tuning import LoRA
from minimind.schema import check_fields

Change = Literal["fixed", "topology", "free", "silent"]

_SAMPLING = ("seq_len", "document_mask", "packing", "seed", "global_batch_size")
_LAYOUT = (
    "optimizer", "offload_optimizer", "autocast", "grad_accum_dtype", "moe_backend", "sub_group_size",
    "round_robin_gradients", "zero_hpz_partition_size", "embedding_apart",
)  # fmt: skip
_TRAINED = ("lora_rank", "lora_alpha", "lora_targets", "freeze")
AT_RESUME: dict[str, Change] = {
    # Which weights there are and what the model computes from them...
    **dict.fromkeys((field.name for field in dataclasses.fields(ModelConfig)), "fixed"),
    # ...but for what only training reads, or what gives the same values in another way.
    **dict.fromkeys(("flash_attn", "dropout", "attention_dropout", "initializer_range"), "free"),
    **dict.fromkeys(("router_aux_loss_coef", "router_z_loss_coef", "seq_aux", "aux_loss_scope"), "free"),
    "rope_original_max_position_embeddings": "free",  # a run notes it by itself
    # How DeepSpeed's files are cut: each rank reads its part of what others wrote.
    **dict.fromkeys(("world_size", "zero_stage", "ep_size", "tp_size", "precision", *_LAYOUT), "topology"),
    # Which samples a step takes, and what the optimizer's state means.
    **dict.fromkeys((*_SAMPLING, "shards", "tokenizer", "optimizer"), "fixed"),
    **dict.fromkeys(("objective", "beta", "label_smoothing", "length_normalised", "target_margin"), "fixed"),
    **dict.fromkeys(("desirable_weight", "undesirable_weight"), "fixed"),
    **dict.fromkeys(("reward", "reward_weights", "group_size", "max_new_tokens", "policy_loss"), "fixed"),
    **dict.fromkeys(("environment", "max_turns"), "fixed"),
    **dict.fromkeys(("clip_low", "clip_high", "loss_average", "advantage_scale", "kl_coef", "rollout_steps"), "fixed"),
    # Which weights the files hold, and on which others they stand.
    **dict.fromkeys((*_TRAINED, "base"), "fixed"),
    **dict.fromkeys(
        ("teacher", "teacher_int8", "teacher_top_k", "distill_alpha", "distill_temperature", "distill_kl"), "fixed"
    ),
    **dict.fromkeys(
        ("run_dir", "resume", "store_checkpoints", "device", "ds_config", "num_workers", "timeout_minutes"), "silent"
    ),
    "mixture_schedule": "silent",  # what it says is part of the fingerprint of the shards
    **dict.fromkeys(("reward_seconds", "reward_workers", "rollout_seconds", "skip_bad_rewards"), "silent"),
    **dict.fromkeys(("log_every", "tensorboard", "wandb_project", "preflight", "profile_steps"), "silent"),
}
"""What a continuation may change. fixed: with another value it is another run. topology: the files are cut anew.
free (every setting that is not here): noted in the log. silent: not worth a log line."""


@dataclass(frozen=True)
class DataFingerprint:
    """What identifies the training data."""

    fingerprint: str
    tokenizer_sha256: str


def describe_run(resolved: ResolvedRun, corpus: DataFingerprint) -> dict[str, Any]:
    """The fields of a manifest that say of which run, on which ranks, a checkpoint is."""
    values = {
        **vars(resolved.data),
        **vars(resolved.train),
        **vars(resolved.zero),
        "optimizer": resolved.optimizer_type,
        # The manifest has always had null where there is no second copy.
        # A group of its own since it has a rate of its own beside Muon.
        "embedding_apart": True if resolved.train.embedding_lr is not None else None,
        "zero_hpz_partition_size": resolved.zero.hpz_partition_size if resolved.zero.hpz_partition_size > 1 else None,
    }
    return {
        "world_size": torch.distributed.get_world_size(),
        "zero_stage": resolved.zero.stage,
        "ep_size": resolved.train.ep_size,
        "tp_size": resolved.train.tp_size,
        "precision": resolved.train.precision,
        "layout": {name: values[name] for name in _LAYOUT},
        "sampling": {name: values[name] for name in _SAMPLING},
        "model": resolved.model.to_dict(),
        "trained": _describe_trained(resolved),
        "shard_fingerprint": corpus.fingerprint,
        "tokenizer_sha256": corpus.tokenizer_sha256,
    }


def _describe_trained(resolved: ResolvedRun) -> dict[str, Any]:
    if resolved.base is None:
        return {}
    settings = {name: getattr(resolved.train, name) for name in _TRAINED}
    return {**settings, **describe_base(resolved.base, Path(resolved.train.run_dir))}


def lora_of(manifest: CheckpointManifest) -> LoRA | None:
    """The adapters that a checkpoint holds, if it does."""
    return trained_settings(manifest).lora


def trained_settings(manifest: CheckpointManifest) -> TrainConfig:
    """The settings that say which weights are trained, the rest at its default."""
    found = {name: manifest.trained[name] for name in _TRAINED if name in manifest.trained}
    return TrainConfig(**check_fields(TrainConfig, found, "manifest: trained"))


def compare(there: Mapping[str, Any], here: Mapping[str, Any], change: Change) -> list[tuple[str, Any, Any]]:
    """(name, value there, value here) of the settings of this kind that are not the same."""
    names = [name for name in {**there, **here} if AT_RESUME.get(name, "free") == change]
    return [(name, there.get(name), here.get(name)) for name in names if there.get(name) != here.get(name)]


def find_obstacles(there: Mapping[str, Any], here: Mapping[str, Any], *, allow_data_change: bool) -> list[str]:
    """Why a run with the settings `here` does not continue one with those of `there`, in words. What either leaves
    open is no obstacle."""
    words = []
    for name, before, now in compare(there, here, "fixed"):
        if name == "shards" and (allow_data_change or there.get("tokenizer") != here.get("tokenizer")):
            continue
        if before is not None and now is not None:
            hints = {
                "shards": " (--allow-data-change if that is meant)",
                "base": " (the sha256 of --init-from's weights: give the model that the run began with)",
            }
            hint = hints.get(name, "")
            words.append(f"{name} {before} there, {now} here{hint}")
    return words


def settings_of(manifest: CheckpointManifest) -> dict[str, Any]:
    """What `AT_RESUME` is about, of a checkpoint or of one that would be saved now."""
    names = ("world_size", "zero_stage", "ep_size", "tp_size", "precision")
    return {
        **manifest.model,
        **manifest.sampling,
        **{name: getattr(manifest, name) for name in names},
        **manifest.layout,
        **{name: getattr(trained_settings(manifest), name) for name in _TRAINED},
        "base": manifest.trained.get("base_sha256", "")[:12] or None,
        "shards": manifest.shard_fingerprint[:12],
        "tokenizer": manifest.tokenizer_sha256[:12],
    }
