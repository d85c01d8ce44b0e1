"""DeepSpeed's JSON by itself: the types of its sections, what it says of ZeRO and the optimizer, other stages of it."""

import copy
from typing import Any, Literal

from minimind.errors import UserError
from minimind.model.config import ModelConfig
from minimind.schema import convert

_BUCKET = {1: 200_000_000, 2: 200_000_000, 3: 50_000_000}
# Stage 2 fills its buckets in every micro-batch: what a processor reduces at once should be near its caches.
_BUCKET_ON_CPU = {**_BUCKET, 2: 20_000_000}
_SMALLEST_BUCKET = 5_000_000
"""On a GPU: 10 MB in 16 bit, below which a collective takes as long as a larger one."""

AUTO = "auto"
Auto = Literal["auto"]

PRECISION_SECTIONS = ("bf16", "fp16", "torch_autocast")

# fmt: off
_OBJECTS = (
    *PRECISION_SECTIONS, "optimizer", "scheduler", "data_types", "zero_optimization", "aio", "comms_logger",
    "flops_profiler", "timers", "tensorboard", "wandb", "csv_monitor", "comet", "checkpoint", "compile",
    "expert_parallel", "tensor_parallel",
)
_TYPES: dict[tuple[str, str], Any] = {
    ("optimizer", "type"): str, ("optimizer", "params"): dict | None,
    ("scheduler", "type"): str, ("scheduler", "params"): dict | None,
    ("zero_optimization", "stage"): Literal["auto", 0, 1, 2, 3],
    ("zero_optimization", "offload_optimizer"): dict | None, ("zero_optimization", "offload_param"): dict | None,
    **{(key, "enabled"): bool | Auto for key in PRECISION_SECTIONS},
    ("data_types", "grad_accum_dtype"): Literal["auto", "fp32", "bf16", "fp16"] | None,
}
# fmt: on


def zero_stage(ds: dict[str, Any]) -> int:
    """ZeRO stage of a DeepSpeed configuration; 0 where it says nothing."""
    stage = ds.get("zero_optimization", {}).get("stage", 0)
    return 0 if stage == AUTO else stage


def offload_device(ds: dict[str, Any], what: str) -> Any:
    """ "cpu", "nvme" or None for `what` in ("optimizer", "param")."""
    device = (ds.get("zero_optimization", {}).get(f"offload_{what}") or {}).get("device", "none")
    return None if device == "none" else device


def optimizer_name(ds: dict[str, Any]) -> str | None:
    """ "adamw", "muon", "deepspeed" for any other type that the JSON names, or None where it names none."""
    section = ds.get("optimizer", {})
    kind, params = section.get("type", AUTO).lower(), section.get("params") or {}
    if kind == AUTO:
        return None
    # DeepSpeed takes "Adam" for AdamW unless adam_w_mode is off; without either, it is a different optimizer.
    is_adamw = kind == "adamw" or (kind == "adam" and params.get("adam_w_mode") is not False)
    if is_adamw and params.get("bias_correction") is not False:
        return "adamw"
    return "muon" if kind == "muon" else "deepspeed"


def check_types(ds: dict[str, Any]) -> None:
    """Refuse a wrong type where something is read before DeepSpeed's own parsers see it.

    Raises:
        UserError: naming the key and what it should be.
    """
    for key in _OBJECTS:
        if key in ds:
            convert(ds[key], dict, f"DeepSpeed config: {key}")
    for (section, key), kind in _TYPES.items():
        if key in ds.get(section, {}):
            convert(ds[section][key], kind, f"DeepSpeed config: {section}.{key}")
    for what in ("optimizer", "param"):
        if offload_device(ds, what) == "nvme" and not ds["zero_optimization"][f"offload_{what}"].get("nvme_path"):
            raise UserError(f"DeepSpeed config: offload_{what} to nvme needs an nvme_path, a folder on a local disk")


def with_stage(ds: dict[str, Any], stage: int, offloaded: tuple[str, ...]) -> dict[str, Any]:
    """The user's JSON in another ZeRO stage, with other things offloaded, and all else as it is."""
    changed = copy.deepcopy(ds)
    zero = changed.setdefault("zero_optimization", {})
    zero["stage"] = stage
    for what in ("optimizer", "param"):
        zero.pop(f"offload_{what}", None)
        if what in offloaded:
            zero[f"offload_{what}"] = {"device": "cpu"}
    if stage != 3:
        zero.pop("zero_hpz_partition_size", None)
    if stage != 0 and "torch_autocast" in changed and "bf16" not in changed:
        del changed["torch_autocast"]
        changed["data_types"] = {"grad_accum_dtype": "fp32"}
    return changed


def without_batch(ds: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    """A copy of the user's JSON that leaves the batch to the run, and the accumulation that it had."""
    accumulation = ds.get("gradient_accumulation_steps")
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {**copy.deepcopy(ds), **dict.fromkeys(keys, AUTO)}, accumulation if isinstance(accumulation, int) else None


def settle_communication(ds: dict[str, Any], model: ModelConfig, *, num_averaging: int, device_type: str) -> None:
    """Replace "auto" in `zero_optimization`, in place.

    | setting | GPU | CPU |
    |---|---|---|
    | `overlap_comm` | true | false: there is no second stream, only a second buffer |
    | `reduce_scatter` | true | false on a single rank without experts, where it copies every gradient once more |
    | `reduce_bucket_size` | an eighth of the model, so that the first is sent early in the backward; 5,000,000 to \
200,000,000 (stage 3: 50,000,000) | 200,000,000 (stage 2: 20,000,000; stage 3: 50,000,000) |
    | `stage3_prefetch_bucket_size` | a block, at least 50,000,000: the next one is fetched while one computes | same |
    | `stage3_max_live_parameters`, `stage3_max_reuse_distance` | three blocks, at least 1,000,000,000 | same |

    None of them changes a sum: on one rank there is nothing to sum, and they only decide when and how much at once.

    Args:
        num_averaging: ranks over which gradients are averaged.
        device_type: torch's name of it: "cpu", or an accelerator's
    """
    zero = ds.get("zero_optimization", {})
    on_cpu = device_type == "cpu"
    stage = zero_stage(ds)
    bucket = (_BUCKET_ON_CPU if on_cpu else _BUCKET).get(stage, _BUCKET[1])
    if not on_cpu:
        bucket = min(bucket, max(_SMALLEST_BUCKET, model.num_params() // 8))
    choices: dict[str, Any] = {
        "overlap_comm": not on_cpu,
        # DeepSpeed reduces experts' gradients by reduce_scatter alone.
        "reduce_scatter": model.use_moe or num_averaging > 1 or not on_cpu,
        "reduce_bucket_size": bucket,
    }
    if stage == 3:
        block = model.num_params() // model.num_hidden_layers
        choices["stage3_prefetch_bucket_size"] = max(50_000_000, block)
        choices["stage3_max_live_parameters"] = choices["stage3_max_reuse_distance"] = max(1_000_000_000, 3 * block)
    for name, value in choices.items():
        if zero.get(name) == AUTO:
            zero[name] = value
