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


def resolve_batch(
    micro: int | None, total: int | None, accumulation: int | None, dp_size: int, overlaps: Overlaps
) -> dict[str, int]:
    """Any two of the three batch figures give the third; an inexact division names the nearest valid values."""
    given = {"micro_batch_size": micro, "global_batch_size": total, "gradient_accumulation_steps": accumulation}
    check_fields(TrainConfig, given)
    if total is not None:
        if micro is None:
            unit = dp_size * (accumulation or 1)
            _check_divides(total, unit, f"{dp_size} ranks x accumulation {accumulation or 1}")
            share = total // unit
            if accumulation is not None:
                micro = share
            else:
                micro = max(size for size in range(1, min(DEFAULT_MICRO_BATCH_SIZE, share) + 1) if share % size == 0)
        _check_divides(total, micro * dp_size, f"micro batch {micro} x {dp_size} ranks")
        derived = total // (micro * dp_size)
        if accumulation is not None and accumulation != derived:
            overlaps.mismatches.append(
                f"gradient_accumulation_steps is {accumulation}, but global_batch_size {total} / (micro_batch_size "
                f"{micro} x {dp_size} ranks) is {derived}"
            )
        accumulation = derived
    else:
        micro = micro or DEFAULT_MICRO_BATCH_SIZE
        accumulation = accumulation or 1
    return {
        "micro_batch_size": micro,
        "global_batch_size": micro * accumulation * dp_size,
        "gradient_accumulation_steps": accumulation,
    }


def _check_divides(total: int, unit: int, what: str) -> None:
    if total % unit:
        below, above = total // unit * unit, -(-total // unit) * unit
        nearest_values = f"{below} or {above}" if below else str(above)
        raise UserError(f"global_batch_size: {total} is no multiple of {unit} ({what}); nearest: {nearest_values}")


def take_optimizer(overlaps: Overlaps, run: RunConfig, ds: dict[str, Any]) -> dict[str, Any]:
    params = ds.get("optimizer", {}).get("params") or {}
    theirs = optimizer_name(ds)
    optimizer = overlaps.agree("optimizer", run.train.optimizer, theirs, "optimizer.type")
    if optimizer == "deepspeed" and theirs != "deepspeed":
        raise UserError("optimizer: 'deepspeed' needs an optimizer.type in the DeepSpeed config; add one, or use adamw")
    values = {
        name: overlaps.take(name, getattr(run.train, name), params, name, "optimizer.params.")
        for name in ("lr", "betas", "eps", "weight_decay")
    }
    if isinstance(values["betas"], list):
        values["betas"] = tuple(values["betas"])
    return {"optimizer": optimizer, **values}


def take_schedule(overlaps: Overlaps, run: RunConfig, ds: dict[str, Any]) -> str | None:
    section = ds.get("scheduler", {})
    kind = section.get("type")
    theirs = None if kind in (None, AUTO) else "deepspeed"
    schedule = overlaps.agree("schedule", run.train.schedule, theirs, f"scheduler.type {kind}")
    if schedule == "deepspeed" and theirs is None:
        raise UserError("schedule: 'deepspeed' needs a scheduler.type in the DeepSpeed config; name one, or use cosine")
    for key, value in (section.get("params") or {}).items():
        if value == AUTO and theirs is not None:
            raise UserError(
                f'DeepSpeed config: scheduler.params.{key} is "auto", which only the run\'s own schedules resolve; '
                "give a value, or remove the scheduler section and use --schedule"
            )
        if value != AUTO and theirs is None:
            raise UserError(
                f"DeepSpeed config: scheduler.params.{key} belongs to no scheduler; add a scheduler.type, or remove the"
                " section and use --schedule"
            )
    return schedule


def take_precision(overlaps: Overlaps, run: RunConfig, ds: dict[str, Any]) -> str | None:
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
