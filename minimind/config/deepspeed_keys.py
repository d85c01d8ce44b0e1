"""DeepSpeed's JSON by itself: its sections and types, and the sections that this trainer has no use for.

DeepSpeed ignores a misspelt section and fails late on a wrong type; here each is one line, before anything starts.
"""

import copy
from typing import Any, Literal

from minimind.errors import UserError
from minimind.schema import convert, nearest

_BUCKET = {1: 200_000_000, 2: 200_000_000, 3: 50_000_000}
# Stage 2 fills its buckets in every micro-batch: what a processor reduces at once should be near its caches.
_BUCKET_ON_CPU = {**_BUCKET, 2: 20_000_000}

AUTO = "auto"

PRECISION_SECTIONS = ("bf16", "fp16", "torch_autocast")

# The top level of DeepSpeed 0.19.8's configuration. DeepSpeed ignores a key that it does not know.
# fmt: off
_SCALARS = frozenset((
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "communication_data_type", "prescale_gradients",
    "gradient_predivide_factor", "sparse_gradients", "disable_allgather", "steps_per_print", "wall_clock_breakdown",
    "memory_breakdown", "dump_state", "log_level", "use_data_before_expert_parallelism", "disable_python_gc",
))
_OBJECTS = frozenset((
    "optimizer", "scheduler", "bf16", "fp16", "torch_autocast", "data_types", "zero_optimization", "aio",
    "comms_logger", "flops_profiler", "timers", "tensorboard", "wandb", "csv_monitor", "comet", "checkpoint",
    "compile", "expert_parallel",
))
# fmt: on
SECTIONS = _SCALARS | _OBJECTS

# Known to DeepSpeed, but it would do nothing here, or change what a step means; each with what to do instead.
UNUSED_SECTIONS = {
    "activation_checkpointing": "this block does nothing by itself; use --activation-checkpointing",
    "amp": "removed from DeepSpeed; use --precision bf16",
    "bfloat16": "an old name; write bf16",
    "curriculum_learning": "removed from DeepSpeed",
    "data_efficiency": "the order of the data is the run's own",
    "dataloader_drop_last": "the run has its own loader, and no partial batches",
    "elasticity": "removed from DeepSpeed; a run resumes on another number of ranks by itself",
    "gradient_allreduce_op": "the loss is normalised for the mean over ranks",
    "managed_gradient_accumulation": "the run follows DeepSpeed's own accumulation boundary",
    "pipeline": "the model is not a pipeline",
    "sequence_parallel_size": "the model has no sequence parallelism",
    "seq_parallel_communication_data_type": "the model has no sequence parallelism",
    "sparse_attention": "removed from DeepSpeed",
    "tensor_parallel": "the model has no tensor parallelism",
    "hybrid_engine": "it serves generation inside reinforcement learning",
    "autotuning": "start DeepSpeed's autotuner from its own launcher",
    "compression_training": "the run does not compress",
    "weight_quantization": "the run does not quantise weights",
}


# fmt: off
Auto = Literal["auto"]
_TYPES: dict[tuple[str, str], Any] = {
    ("optimizer", "type"): str, ("optimizer", "params"): dict | None,
    ("scheduler", "type"): str, ("scheduler", "params"): dict | None,
    ("zero_optimization", "stage"): Literal["auto", 0, 1, 2, 3],
    ("zero_optimization", "offload_optimizer"): dict | None, ("zero_optimization", "offload_param"): dict | None,
    **{(key, "enabled"): bool | Auto for key in PRECISION_SECTIONS},
    ("data_types", "grad_accum_dtype"): Literal["auto", "fp32", "bf16", "fp16"] | None,
}
_OPTIMIZER_PARAMS = {
    "adamw": frozenset(("lr", "betas", "eps", "weight_decay", "torch_adam", "adam_w_mode")),
    "muon": frozenset((
        "lr", "betas", "eps", "weight_decay", "adam_w_mode", "momentum", "muon_lr", "adam_lr", "ns_method",
        "per_head_muon",
    )),
}
_CPU_ADAM_PARAMS = frozenset(("bias_correction", "amsgrad", "fp32_optimizer_states"))
_DATA_TYPES = frozenset(("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"))
_OLD_ZERO_KEYS = {
    "cpu_offload": "offload_optimizer", "cpu_offload_params": "offload_param",
    "cpu_offload_use_pin_memory": "pin_memory in offload_optimizer",
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
    kind = section.get("type", AUTO)
    if kind == AUTO:
        return None
    if kind.lower() == "muon":
        return "muon"
    # With adam_w_mode (DeepSpeed's default) "Adam" is AdamW; without it, it is a different optimizer.
    is_adamw = kind.lower() == "adamw" or (
        kind.lower() == "adam" and section.get("params", {}).get("adam_w_mode", True)
    )
    return "adamw" if is_adamw else "deepspeed"


def check_sections(ds: dict[str, Any]) -> None:
    """Refuse what DeepSpeed would ignore, trip over, or what means nothing to this trainer.

    Raises:
        UserError: naming the key and the nearest known one, or what to do instead.
    """
    for key, value in ds.items():
        if key in UNUSED_SECTIONS:
            raise UserError(f"DeepSpeed config: '{key}' is not used by this trainer: {UNUSED_SECTIONS[key]}; remove it")
        if key not in SECTIONS:
            raise UserError(f"DeepSpeed config: unknown section '{key}'{nearest(key, sorted(SECTIONS))}")
        if key in _OBJECTS:
            convert(value, dict, f"DeepSpeed config: {key}")
    for (section, key), kind in _TYPES.items():
        if key in ds.get(section, {}):
            convert(ds[section][key], kind, f"DeepSpeed config: {section}.{key}")
    for key in ("writer", "use_node_local_storage", "load_universal"):
        if ds.get("checkpoint", {}).get(key):
            raise UserError(
                f"DeepSpeed config: checkpoint.{key} is not used: the run writes checkpoints itself; remove it"
            )
    _check_zero(ds)
    _check_optimizer_params(ds)
    for key in ds.get("data_types", {}):
        if key not in _DATA_TYPES:
            raise UserError(f"DeepSpeed config: data_types: unknown field '{key}'{nearest(key, sorted(_DATA_TYPES))}")


def _check_zero(ds: dict[str, Any]) -> None:
    zero = ds.get("zero_optimization", {})
    for old, new in _OLD_ZERO_KEYS.items():
        if old in zero:
            raise UserError(f"DeepSpeed config: zero_optimization.{old} is an old name; use {new}")
    if zero.get("compute_grad_norm") is False or ds.get("bf16", {}).get("check_grad_overflow") is False:
        raise UserError(
            "DeepSpeed config: with compute_grad_norm or check_grad_overflow off, a NaN gradient reaches the weights; "
            "remove the setting"
        )
    for what in ("optimizer", "param"):
        device = offload_device(ds, what)
        if device is None:
            continue
        lowest = 3 if what == "param" else 1
        if zero_stage(ds) < lowest:
            raise UserError(
                f"DeepSpeed config: offload_{what} to {device} needs ZeRO stage {lowest} or more, not {zero_stage(ds)}"
            )
        if device == "nvme" and not zero[f"offload_{what}"].get("nvme_path"):
            raise UserError(f"DeepSpeed config: offload_{what} to nvme needs an nvme_path, a folder on a local disk")


def _check_optimizer_params(ds: dict[str, Any]) -> None:
    known = _OPTIMIZER_PARAMS.get(optimizer_name(ds) or "adamw")
    if known is None:
        return  # DeepSpeed's or torch's own: it says itself what it takes
    if offload_device(ds, "optimizer") is not None:
        known |= _CPU_ADAM_PARAMS
    for key in ds.get("optimizer", {}).get("params", {}):
        if key not in known:
            raise UserError(f"DeepSpeed config: optimizer.params: unknown field '{key}'{nearest(key, sorted(known))}")


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
    if stage == 0:  # 16 bit goes through autocast there
        for key in ("bf16", "fp16", "data_types"):
            changed.pop(key, None)
        changed["torch_autocast"] = {"enabled": AUTO}
    elif "torch_autocast" in changed and "bf16" not in changed:
        del changed["torch_autocast"]
        changed["data_types"] = {"grad_accum_dtype": "fp32"}
    return changed


def without_batch(ds: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    """A copy of the user's JSON that leaves the batch to the run, and the accumulation that it had."""
    accumulation = ds.get("gradient_accumulation_steps")
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {**copy.deepcopy(ds), **dict.fromkeys(keys, AUTO)}, accumulation if isinstance(accumulation, int) else None


def settle_communication(ds: dict[str, Any], *, dp_size: int, device_type: str, has_experts: bool) -> None:
    """Replace "auto" in `zero_optimization`, in place.

    | setting | GPU | CPU |
    |---|---|---|
    | `overlap_comm` | true | false: there is no second stream, only a second buffer |
    | `reduce_scatter` | true | false on a single rank without experts, where it copies every gradient once more |
    | `reduce_bucket_size` | 200,000,000 (stage 3: 50,000,000) | the same, but at stage 2 20,000,000 |

    None of them changes a sum: on one rank there is nothing to sum, and they only decide when and how much at once.

    Args:
        dp_size: data-parallel ranks.
        device_type: "cuda", "cpu"...
        has_experts: DeepSpeed reduces experts' gradients by reduce_scatter alone.
    """
    zero = ds.get("zero_optimization", {})
    on_cpu = device_type == "cpu"
    stage = zero_stage(ds)
    choices = {
        "overlap_comm": not on_cpu,
        "reduce_scatter": has_experts or dp_size > 1 or not on_cpu,
        "reduce_bucket_size": (_BUCKET_ON_CPU if on_cpu else _BUCKET).get(stage, _BUCKET[1]),
    }
    for name, value in choices.items():
        if zero.get(name) == AUTO:
            zero[name] = value
