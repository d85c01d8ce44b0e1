"""Settings of a resolved run that do not go together."""

from minimind.config.muon import check_muon
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import Precision
from minimind.errors import UserError
from minimind.model.config import ModelConfig


def check_combinations(resolved: ResolvedRun, device_type: str) -> None:
    """Refuse settings of which each is right, and not the two together.

    Raises:
        UserError: naming both.
    """
    train, zero = resolved.train, resolved.zero
    if train.precision == "fp16" and device_type == "cpu":
        raise UserError("precision: fp16 does not run on CPU; use --precision bf16 or fp32")
    if zero.stage == 0 and train.optimizer == "deepspeed":
        raise UserError(
            f"optimizer: {resolved.optimizer_type} applies a NaN gradient at ZeRO stage 0; use stage 1, or adamw"
        )
    check_muon(resolved)
    _check_window_warmup(resolved)
    if train.moe_backend == "autoep" and device_type != "cpu":
        _check_alignment(resolved.model, train.precision)


def _check_window_warmup(resolved: ResolvedRun) -> None:
    data, train = resolved.data, resolved.train
    if not data.window_warmup_steps:
        return
    found = {
        f"seq_len {data.seq_len}, which is no multiple of 4": data.seq_len % 4,
        "a document mask, which cuts windows itself": data.document_mask,
        f"sp_size {train.sp_size}, which shares a window": train.sp_size > 1,
        f"objective {train.objective}": train.objective not in (None, "pretrain"),
    }
    for what in (name for name, is_so in found.items() if is_so):
        raise UserError(f"window_warmup_steps: {data.window_warmup_steps} does not go with {what}; leave it out")


def _check_alignment(model: ModelConfig, precision: Precision) -> None:
    """torch's grouped product takes rows of whole 16 bytes."""
    unit = 4 if precision == "fp32" else 8
    sizes = {"hidden_size": model.hidden_size, "moe_intermediate_size": model.expert_feed_forward_size}
    for name, size in sizes.items():
        if size % unit:
            raise UserError(
                f"{name}: {size} is no multiple of {unit}, which the experts' product on a GPU asks for in "
                f"{precision}; take {-(-size // unit) * unit}"
            )
