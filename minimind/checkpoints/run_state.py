"""What a checkpoint remembers of its run beside tensors: the data, what decides a step's samples, how files are cut.

With these a continuation is compared. Knows nothing of engines, files or ranks.
"""

from dataclasses import dataclass
from typing import Any

from minimind.config.resolve import Resolved
from minimind.config.deepspeed_keys import offload_device
from minimind.errors import UserError


@dataclass(frozen=True)
class Corpus:
    """What identifies the training data."""

    fingerprint: str
    tokenizer_sha256: str


def check_checkpoint_section(ds: dict[str, Any]) -> None:
    """Refuse what DeepSpeed's `checkpoint` section cannot do here.

    Raises:
        UserError: naming the key.
    """
    for key in ("writer", "use_node_local_storage", "load_universal"):
        if ds.get("checkpoint", {}).get(key):
            raise UserError(
                f"DeepSpeed config: checkpoint.{key} is not used: the run writes checkpoints itself; remove it"
            )


def describe_layout(resolved: Resolved) -> dict[str, Any]:
    """Settings beside ranks, stage and precision that decide what DeepSpeed's files look like."""
    zero = resolved.ds.get("zero_optimization", {})
    train = resolved.run.train
    return {
        "optimizer": train.optimizer if train.optimizer != "deepspeed" else resolved.ds["optimizer"]["type"],
        "offload_optimizer": offload_device(resolved.ds, "optimizer"),
        "autocast": bool(resolved.ds.get("torch_autocast", {}).get("enabled")),
        "grad_accum_dtype": resolved.ds.get("data_types", {}).get("grad_accum_dtype"),
        "moe_backend": train.moe_backend,
        **{key: zero.get(key) for key in ("sub_group_size", "round_robin_gradients", "zero_hpz_partition_size")},
    }


def describe_sampling(resolved: Resolved) -> dict[str, Any]:
    """Settings that decide, beside the shards, which samples a step takes."""
    data, train = resolved.run.data, resolved.run.train
    return {
        "seq_len": data.seq_len,
        "document_mask": data.document_mask,
        "seed": train.seed,
        "global_batch_size": train.global_batch_size,
    }
