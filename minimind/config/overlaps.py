"""Settings that the run configuration and DeepSpeed's JSON share: what each side says, and where they disagree."""

from typing import Any

from minimind.config.deepspeed_keys import AUTO, PRECISION_SECTIONS, optimizer_name
from minimind.config.run_config import RunConfig, TrainConfig
from minimind.errors import UserError
from minimind.schema import check_fields

DEFAULT_MICRO_BATCH_SIZE = 8


class Overlaps:
    """Collects what each side says, so that all disagreements are reported together."""

    def __init__(self) -> None:
        self.mismatches: list[str] = []

    def agree(self, name: str, ours: Any, theirs: Any, key: str) -> Any:
        """The value of the side that set one; a disagreement is noted."""
        if theirs is None or ours is None or _equal(ours, theirs):
            return theirs if ours is None else ours
        self.mismatches.append(f"{name} is {ours} in the run and {theirs} as {key} in the DeepSpeed config")
        return ours

    def take(self, name: str, ours: Any, section: dict[str, Any], key: str, prefix: str = "") -> Any:
        """`agree` with the value of `section`, where "auto" and absent mean unset."""
        theirs = section.get(key)
        return self.agree(name, ours, None if theirs == AUTO else theirs, prefix + key)

    def finish(self) -> None:
        """Raise `UserError` listing every disagreement, if there is any."""
        if self.mismatches:
            raise UserError(
                "; ".join(self.mismatches) + '; leave one side out, or write "auto" in the DeepSpeed config'
            )


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, tuple) and isinstance(theirs, list):
        return list(ours) == theirs
    return ours == theirs


_BATCH_KEYS = {
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "micro_batch_size": "train_micro_batch_size_per_gpu",
    "global_batch_size": "train_batch_size",
}


def take_batch(run: RunConfig, ds: dict[str, Any], dp_size: int, notes: list[str]) -> dict[str, int]:
    """The three batch figures. Those of the JSON give way to flags that they do not fit, with a note.

    Raises:
        UserError: an inexact division, with the nearest valid values; without flags, also the flags that would fit.
    """
    if run.train.micro_batch_size == AUTO:
        raise UserError("micro_batch_size: auto is found by training, on its GPUs; plan has --find-micro-batch")
    ours = {name: getattr(run.train, name) for name in _BATCH_KEYS if getattr(run.train, name) is not None}
    theirs = {name: ds[key] for name, key in _BATCH_KEYS.items() if ds.get(key, AUTO) not in (AUTO, None)}
    theirs = check_fields(TrainConfig, theirs, "DeepSpeed config")
    if not ours:
        try:
            return resolve_batch(theirs, dp_size)
        except UserError as error:
            micro, total = _nearest_batch(theirs, dp_size)
            raise UserError(
                f"{error}; or pass --micro-batch-size {micro} --global-batch-size {total}: the file gives way"
            ) from None
    kept = {name: value for name, value in theirs.items() if name not in ours}
    while True:
        try:
            batch = resolve_batch({**kept, **ours}, dp_size)
            break
        except UserError:
            if not kept:
                raise
            del kept[next(iter(kept))]
    for name, value in theirs.items():
        if batch[name] != value:
            notes.append(f"{_BATCH_KEYS[name]} {value} of the DeepSpeed config gives way to the flags: {batch[name]}")
    return batch


def resolve_batch(given: dict[str, int], dp_size: int) -> dict[str, int]:
    """Any two of the three batch figures give the third; an inexact division names the nearest valid values."""
    check_fields(TrainConfig, given)
    micro, total = given.get("micro_batch_size"), given.get("global_batch_size")
    accumulation = given.get("gradient_accumulation_steps")
    if total is None:
        micro, accumulation = micro or DEFAULT_MICRO_BATCH_SIZE, accumulation or 1
    else:
        if micro is None:
            unit = dp_size * (accumulation or 1)
            _check_divides(total, unit, f"{dp_size} ranks x accumulation {accumulation or 1}")
            micro = total // unit if accumulation is not None else _largest_divisor(total // unit)
        _check_divides(total, micro * dp_size, f"micro batch {micro} x {dp_size} ranks")
        derived = total // (micro * dp_size)
        if accumulation not in (None, derived):
            raise UserError(
                f"gradient_accumulation_steps is {accumulation}, but global_batch_size {total} / (micro_batch_size "
                f"{micro} x {dp_size} ranks) is {derived}"
            )
        accumulation = derived
    return {
        "micro_batch_size": micro,
        "global_batch_size": micro * accumulation * dp_size,
        "gradient_accumulation_steps": accumulation,
    }


def _largest_divisor(share: int, most: int = DEFAULT_MICRO_BATCH_SIZE) -> int:
    return max(size for size in range(1, min(most, share) + 1) if share % size == 0)


def _nearest_batch(theirs: dict[str, int], dp_size: int) -> tuple[int, int]:
    """A micro and a global batch that fit the ranks, with the file's global batch as far as it divides."""
    total = max(1, theirs["global_batch_size"] // dp_size) * dp_size
    return _largest_divisor(total // dp_size, theirs.get("micro_batch_size", DEFAULT_MICRO_BATCH_SIZE)), total


def _check_divides(total: int, unit: int, what: str) -> None:
    if total % unit:
        below, above = total // unit * unit, -(-total // unit) * unit
        nearest_values = f"{below} or {above}" if below else str(above)
        raise UserError(f"global_batch_size: {total} is no multiple of {unit} ({what}); nearest: {nearest_values}")


def take_optimizer(overlaps: Overlaps, run: RunConfig, ds: dict[str, Any]) -> dict[str, Any]:
    """`optimizer` and its settings."""
    params = ds.get("optimizer", {}).get("params") or {}
    theirs = optimizer_name(ds)
    optimizer = overlaps.agree("optimizer", run.train.optimizer, theirs, "optimizer.type")
    if optimizer == "deepspeed" and theirs != "deepspeed":
        raise UserError("optimizer: 'deepspeed' needs an optimizer.type in the DeepSpeed config; add one, or use adamw")
    if theirs == "muon":  # DeepSpeed's takes `lr` for both kinds of parameters, unless one has its own
        shared = params.get("lr", AUTO)
        params = {**params, "lr": params.get("adam_lr", shared)}
        params.setdefault("muon_lr", shared if run.train.muon_lr is None else AUTO)
    values = {
        name: overlaps.take(name, getattr(run.train, name), params, name, "optimizer.params.")
        for name in ("lr", "muon_lr", "betas", "eps", "weight_decay")
    }
    if isinstance(values["betas"], list):
        values["betas"] = tuple(values["betas"])
    values |= {"embedding_lr": run.train.embedding_lr, "norm_lr": run.train.norm_lr}
    return {"optimizer": optimizer, **values}


# DeepSpeed's schedulers that "auto" may stand in, the run's schedule of that shape and its floor.
_SHAPES: dict[str, tuple[str, float | None]] = {
    "WarmupLR": ("constant", None), "WarmupDecayLR": ("linear", 0.0), "WarmupCosineLR": ("cosine", 0.0001)
}  # fmt: skip


def take_schedule(overlaps: Overlaps, run: RunConfig, ds: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """`schedule`, and what a scheduler with "auto" says of the run's own: `warmup_steps`, `min_lr_ratio`, `steps`.

    Raises:
        UserError: a scheduler is asked for that the JSON does not name, or "auto" stands in one without a counterpart.
    """
    section, train = ds.get("scheduler", {}), run.train
    kind, params = section.get("type", AUTO), section.get("params") or {}
    autos = [key for key, value in params.items() if value == AUTO]
    if kind == AUTO:
        if train.schedule == "deepspeed":
            raise UserError(
                "schedule: 'deepspeed' needs a scheduler.type in the DeepSpeed config; name one, or use cosine"
            )
        if len(autos) < len(params):
            key = next(key for key in params if key not in autos)
            raise UserError(
                f"DeepSpeed config: scheduler.params.{key} belongs to no scheduler; add a scheduler.type, or remove "
                "the section and use --schedule"
            )
        return {"schedule": train.schedule}
    if not autos:
        return {"schedule": overlaps.agree("schedule", train.schedule, "deepspeed", f"scheduler.type {kind}")}
    if kind not in _SHAPES or train.schedule == "deepspeed":
        raise UserError(
            f'DeepSpeed config: scheduler.params.{autos[0]} is "auto", which only the run\'s own schedules resolve; '
            "give a value, or remove the scheduler section and use --schedule"
        )
    given = {key: value for key, value in params.items() if value != AUTO}
    if given.pop("warmup_min_lr", 0):
        raise UserError(
            'DeepSpeed config: scheduler.params.warmup_min_lr: the run\'s warm-up begins at 0; write 0 or "auto"'
        )
    shape, floor = _SHAPES[kind]
    values = {
        "schedule": train.schedule or shape,
        "warmup_steps": overlaps.take("warmup_steps", train.warmup_steps, given, "warmup_num_steps", "scheduler."),
        "steps": overlaps.take("steps", train.steps, given, "total_num_steps", "scheduler."),
        "lr": overlaps.take("lr", train.lr, given, "warmup_max_lr", "scheduler."),
    }
    if train.schedule is None and train.min_lr_ratio is None:
        values["min_lr_ratio"] = given.get("cos_min_ratio", floor)
    notes.append(f'scheduler {kind} with "auto": the run\'s own schedule {values["schedule"]}, its warm-up linear')
    return {name: value for name, value in values.items() if value is not None}


def take_precision(overlaps: Overlaps, run: RunConfig, ds: dict[str, Any]) -> str | None:
    """The precision that either side names, or None."""
    enabled = {key: ds[key].get("enabled", AUTO) for key in PRECISION_SECTIONS if key in ds}
    on = [key for key, value in enabled.items() if value is True]
    if len(on) > 1:
        raise UserError(f"DeepSpeed config: {' and '.join(on)} are both enabled; enable one")
    theirs = None
    if on == ["torch_autocast"]:
        dtype = str(ds["torch_autocast"].get("dtype", "bfloat16")).removeprefix("torch.")
        theirs = {"bfloat16": "bf16", "bf16": "bf16", "float16": "fp16", "fp16": "fp16", "half": "fp16"}.get(dtype)
        if theirs is None and dtype != AUTO:
            raise UserError(f"DeepSpeed config: torch_autocast.dtype is '{dtype}'; expected bfloat16 or float16")
    elif on:
        theirs = on[0]
    elif run.train.precision is None and enabled and all(value is False for value in enabled.values()):
        theirs = "fp32"
    ours = run.train.precision
    if theirs is None and enabled.get(ours or "") is False:
        theirs = "off"
    return overlaps.agree("precision", ours, theirs, f"{on[0] if on else ours}.enabled")
