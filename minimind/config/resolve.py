"""Merge the run configuration and DeepSpeed's JSON into one `ResolvedRun`. Pure functions, without DeepSpeed.

The user's JSON goes to DeepSpeed as it is, except for what `deepspeed_file` and `deepspeed_table` read in another way,
and the settings that the run configuration also has (batch sizes, clipping, optimizer, precision, schedule). Those are
resolved on a copy, and all disagreements are reported at once.
"""

import copy
import dataclasses
from typing import Any

from minimind.config.combinations import check_combinations
from minimind.config.deepspeed_file import modernize
from minimind.config.deepspeed_keys import AUTO, check_types, settle_communication, zero_stage
from minimind.config.deepspeed_table import settle_table
from minimind.config.expert_parallel import check_experts, take_experts, write_experts
from minimind.config.muon import BETAS, MUON_MOMENTUM, default_optimizer, default_rates
from minimind.config.overlaps import Overlaps, take_batch, take_optimizer, take_precision, take_schedule
from minimind.config.parallel_sizes import check_sequence, take_sizes
from minimind.config.resolved_run import ResolvedRun, ResolvedTrain
from minimind.config.run_config import DTYPE_NAMES, RunConfig, TrainConfig, check_run
from minimind.config.tensor_parallel import check_tensor_parallel, write_tensor_parallel
from minimind.errors import UserError
from minimind.model.config import ModelConfig
from minimind.model.tuning import trained_shapes
from minimind.schema import check_fields

DEFAULTS: dict[str, Any] = {
    "lr": 5e-4,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "schedule": "cosine",
    "min_lr_ratio": 0.1,
}
"""What a setting is where neither the run nor the JSON says it."""

MANY_RANKS = 512
"""A ring rounds a sum in bf16 at every hop: from so many ranks on, a run is told."""


def resolve_run(
    run: RunConfig,
    ds: dict[str, Any],
    *,
    world_size: int,
    num_samples: int | None = None,
    local_world_size: int = 1,
    device_type: str = "cpu",
    bf16_supported: bool = False,
) -> ResolvedRun:
    """Settle every setting that both the run and the DeepSpeed JSON have.

    | run | JSON | result |
    |---|---|---|
    | set | "auto" or absent | the run's |
    | unset | explicit | the JSON's, read back into the run |
    | unset | "auto" or absent | the documented default |
    | set | explicit and different | an error that lists every mismatch |

    Args:
        world_size: all ranks.
        num_samples: training samples in one epoch; None: not known (a plan), so `steps` is 0 unless the run gives it.
        local_world_size: ranks of one node; what "auto" as ZeRO-3's hpZ partition size means.
        device_type: torch's name of it, "cpu" or an accelerator's; decides what precision is possible.
        bf16_supported: whether the device computes in bf16; decides the default precision.

    Raises:
        UserError: a misspelt or unused section or setting, a disagreement, batch sizes that do not divide, a precision
            that the device or the ZeRO stage does not have, or too few samples for one step.
    """
    ds, train = copy.deepcopy(ds), run.train
    notes = modernize(ds)
    check_types(ds)
    overlaps = Overlaps()
    sizes = take_sizes(overlaps, run, ds, world_size)
    num_averaging = world_size // sizes["tp_size"]
    dp_size = num_averaging // sizes["sp_size"]
    notes += _resolve_hpz(ds, num_averaging, local_world_size)
    notes += settle_table(ds, experts=run.model.use_moe, device=device_type)
    values: dict[str, Any] = {
        **sizes,
        **take_batch(run, ds, dp_size, notes),
        "max_grad_norm": overlaps.take("max_grad_norm", train.max_grad_norm, ds, "gradient_clipping"),
        **take_optimizer(overlaps, run, ds),
        **take_experts(overlaps, run, ds),
        "lora_alpha": None if train.lora is None else train.lora.alpha,
    }
    for name, value in take_schedule(overlaps, run, ds, notes).items():
        values[name] = overlaps.agree(name, values.get(name), value, f"scheduler.{name}")
    precision = take_precision(overlaps, run, ds)
    overlaps.finish()
    values["optimizer"] = values["optimizer"] or default_optimizer(run, ds)
    defaults = DEFAULTS if values["optimizer"] != "deepspeed" else {**DEFAULTS, "betas": None, "eps": None}
    if values["optimizer"] == "muon":
        defaults = {**defaults, "betas": BETAS, **default_rates(run.model, values["lr"])}
    values = {name: defaults.get(name) if value is None else value for name, value in values.items()}
    half = "bf16" if bf16_supported else "fp16"  # GPUs older than sm80 only emulate bf16
    if ds.get(half, {}).get("enabled") is False:
        half = "fp32"
    values["precision"] = precision or ("fp32" if device_type == "cpu" else half)
    # What came from the JSON has the types and limits of the run's own fields.
    values = check_fields(TrainConfig, values, "DeepSpeed config")
    run = dataclasses.replace(run, train=dataclasses.replace(train, **values))
    check_run(run)
    _check_schedule_fields(run.train)
    values |= {**_resolve_length(run, num_samples), "ep_size": values["ep_size"] or 1}
    # A GPU is given its work ahead: a reading is a collective and a line, and on a small model as long as a step.
    values["log_every"] = run.train.log_every or (1 if device_type == "cpu" else 10)
    if run.train.min_lr_ratio is None:
        values["min_lr_ratio"] = DEFAULTS["min_lr_ratio"]
    settle_communication(ds, run.model, num_averaging=num_averaging, device_type=device_type)
    notes += [f'{where}: "auto" left to DeepSpeed\'s default' for where in _drop_autos(ds)]
    settled = ResolvedTrain(**{**vars(run.train), **values})
    _write_back(ds, settled)
    write_experts(ds, run.model, settled)
    trained = trained_shapes(run.model, settled.lora, settled.freeze)
    write_tensor_parallel(ds, settled.tp_size, trained)
    model, length_notes = _note_trained_length(run)
    notes += length_notes
    resolved = ResolvedRun(model, run.data, settled, ds, dp_size, notes=())
    check_combinations(resolved, device_type)
    check_experts(resolved)
    check_sequence(resolved)
    check_tensor_parallel(resolved)
    zero = resolved.zero
    if settled.gradient_accumulation_steps > 1 and zero.weights == "bf16" and zero.grad_accum_dtype is None:
        notes.append('gradients accumulate in bf16; "data_types": {"grad_accum_dtype": "fp32"} keeps them exact')
    if num_averaging >= MANY_RANKS and zero.weights == "bf16" and "communication_data_type" not in ds:
        notes.append(
            f"gradients of {num_averaging} ranks are summed in bf16, rounded at every hop; "
            '"communication_data_type": "fp32" sums them exactly, for twice the bytes'
        )
    return dataclasses.replace(resolved, notes=tuple(notes))


def _uses_autocast(ds: dict[str, Any]) -> bool:
    """Whether a 16-bit precision goes through torch_autocast, and not through a bf16 or fp16 block.

    Stage 0 has no blocks: with one, DeepSpeed's Adam starts at its second step there.
    """
    if zero_stage(ds) == 0:
        return True
    if any(ds.get(key, {}).get("enabled") is True for key in ("bf16", "fp16")):
        return False
    return "torch_autocast" in ds and ds["torch_autocast"].get("enabled") is not False


def _note_trained_length(run: RunConfig) -> tuple[ModelConfig, list[str]]:
    """The model with the length that it is trained at, which YaRN needs later: the longest so far. A stretched model
    keeps the length from before."""
    model, seq_len = run.model, run.data.seq_len
    known = model.rope_original_max_position_embeddings
    length = max(known or 0, seq_len) if run.train.init_from is not None else seq_len
    if known is not None and model.rope_scaling_factor != 1 and seq_len > (reach := model.rope_scaling_factor * known):
        return model, [
            f"rope_scaling_factor: {model.rope_scaling_factor:g} stretches {known} tokens to {reach:g}, and seq_len is "
            f"{seq_len}; {seq_len / known:g} would reach it"
        ]
    if model.rope_scaling_factor != 1 or length == known:
        return model, []
    wrong = f"rope_original_max_position_embeddings: the model will say {length}, not {known}: seq_len is {seq_len}"
    return dataclasses.replace(model, rope_original_max_position_embeddings=length), [wrong] if known else []


# Which schedules look at a setting of the learning rate; "deepspeed" has its own in the JSON.
_SCHEDULE_FIELDS = {
    "min_lr_ratio": ("cosine", "linear", "wsd", "step", "exponential"),
    "decay_ratio": ("wsd",),
    "lr_step_size": ("step", "exponential"),
    "lr_gamma": ("step", "exponential"),
    "warmup_steps": ("cosine", "linear", "constant", "wsd", "step", "exponential"),
}


def _check_schedule_fields(train: TrainConfig) -> None:
    for name, schedules in _SCHEDULE_FIELDS.items():
        value = getattr(train, name)
        if train.schedule not in schedules and value not in (getattr(TrainConfig(), name), DEFAULTS.get(name)):
            raise UserError(
                f"{name}: {value} has no effect on schedule {train.schedule}; leave it out, or use --schedule "
                f"{schedules[0]}"
            )


def _resolve_hpz(ds: dict[str, Any], num_averaging: int, local_world_size: int) -> list[str]:
    """hpZ keeps a second copy of the weights inside a node: "auto", or a size of another machine, is that of a node."""
    zero = ds.get("zero_optimization", {})
    size = zero.get("zero_hpz_partition_size", 1)
    if isinstance(size, int) and size >= 1 and num_averaging % size == 0:
        return []
    if (size == AUTO or isinstance(size, int)) and num_averaging % local_world_size == 0:
        zero["zero_hpz_partition_size"] = local_world_size
        return [] if size == AUTO else [f"zero_hpz_partition_size {size}: {local_world_size}, the ranks of a node here"]
    raise UserError(
        f"DeepSpeed config: zero_optimization.zero_hpz_partition_size {size!r} does not divide {num_averaging} ranks; "
        'give the ranks of one node, or "auto"'
    )


def _drop_autos(ds: dict[str, Any]) -> list[str]:
    """Remove every "auto" that is no overlap (DeepSpeed would take it as a string or drop it in silence)."""
    dropped = []

    def walk(section: dict[str, Any], path: str) -> None:
        for key in list(section):
            if isinstance(section[key], dict):
                walk(section[key], f"{path}{key}.")
            elif section[key] == AUTO:
                del section[key]
                if path.split(".")[0] in ("zero_optimization", "aio", "checkpoint", "compile"):
                    dropped.append(path + key)

    walk(ds, "")
    return dropped


def _write_back(ds: dict[str, Any], train: ResolvedTrain) -> None:
    """Put the resolved overlaps into the copy that DeepSpeed gets."""
    ds["train_micro_batch_size_per_gpu"] = train.micro_batch_size
    ds["train_batch_size"] = train.global_batch_size
    ds["gradient_accumulation_steps"] = train.gradient_accumulation_steps
    ds["gradient_clipping"] = train.max_grad_norm
    ds.setdefault("steps_per_print", None)
    # DeepSpeed's own timer waits for the device twice a micro-batch.
    ds.setdefault("timers", {"throughput": {"enabled": False}})
    section = ds.setdefault("optimizer", {})
    section.setdefault("type", {"adamw": "AdamW", "muon": "Muon"}.get(train.optimizer, ""))
    params = section.setdefault("params", {})
    params["lr"], params["weight_decay"] = train.lr, train.weight_decay
    if train.betas is not None:
        params["betas"] = list(train.betas)
    if train.eps is not None:
        params["eps"] = train.eps
    if train.muon_lr is not None:
        params.pop("adam_lr", None)
        params["muon_lr"] = train.muon_lr
        params.setdefault("momentum", MUON_MOMENTUM)
    if train.schedule != "deepspeed":
        ds.pop("scheduler", None)
    autocasts = _uses_autocast(ds)
    autocast = ds.pop("torch_autocast", {})
    if zero_stage(ds) == 0 or (autocasts and train.precision != "fp32"):
        ds.pop("bf16", None)
        ds.pop("fp16", None)
        if train.precision != "fp32":
            ds["torch_autocast"] = {**autocast, "enabled": True, "dtype": DTYPE_NAMES[train.precision]}
    else:
        for key in ("bf16", "fp16"):
            ds.setdefault(key, {})["enabled"] = train.precision == key


def _resolve_length(run: RunConfig, num_samples: int | None) -> dict[str, int]:
    """`steps` and `warmup_steps`; 0 where nothing says them."""
    train = run.train
    assert train.global_batch_size is not None
    steps = train.steps or 0
    if train.steps is None and num_samples is not None:
        steps = int(train.epochs * num_samples // train.global_batch_size)
        if steps < 1:
            raise UserError(
                f"global_batch_size: {train.global_batch_size} samples a step, but {train.epochs:g} epochs of the"
                f" shards hold {int(train.epochs * num_samples)}; lower it, shorten --seq-len, or give --steps"
            )
    warmup = train.warmup_steps
    if warmup is None:
        warmup = max(1, steps // 50) if steps and train.schedule != "deepspeed" else 0
    if steps and warmup > steps:
        raise UserError(f"warmup_steps: {warmup} is longer than the run of {steps} steps; lower it")
    return {"steps": steps, "warmup_steps": warmup}
