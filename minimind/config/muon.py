"""Where a run takes Muon without being told, the peak rates beside it by kind of parameter, and what it refuses."""

from typing import Any

from minimind.config.deepspeed_keys import AUTO, offload_device
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import RunConfig, TrainConfig
from minimind.errors import UserError
from minimind.model.config import ModelConfig

MUON_MOMENTUM = 0.95
REFERENCE_WIDTH = 256
"""Where the rates were found (`benchmarks/recipe.py`)."""


def default_optimizer(run: RunConfig, ds: dict[str, Any]) -> str:
    """`muon` for weights that begin fresh; `adamw` where others are trained further, and where the JSON says more of an
    optimizer than "auto", offloads it, or moves its rate."""
    train, section = run.train, ds.get("optimizer") or {}
    is_fresh = train.init_from is None and not train.keeps_frozen
    is_open = all(value == AUTO for value in (section.get("params") or {}).values())
    scheduler = (ds.get("scheduler") or {}).get("type", AUTO)
    is_near = offload_device(ds, "optimizer") is None and offload_device(ds, "param") is None
    on_text = train.objective in (None, "pretrain", "distill")
    return "muon" if is_fresh and is_open and is_near and on_text and scheduler == AUTO else "adamw"


BETAS = (0.8, 0.95)
"""Of the AdamW beside Muon."""


def default_rates(model: ModelConfig, given: float | None) -> dict[str, float]:
    """Peak rates of a run with Muon where nothing says them.

    | parameters | rate over the width of the model |
    |---|---|
    | matrices between embedding and output | Muon's: the same, as an update has the same spectral norm \
(arXiv 2310.17813) |
    | the output matrix, also as embedding, and routers | AdamW's: falls as 1 / width, as a score is a sum over it \
(arXiv 2203.03466) |
    | an embedding of its own, norms, biases | AdamW's: the same, as nothing is summed |

    Args:
        given: `lr`, if it is set: then the rate of all that AdamW updates.
    """
    rest = given or 1e-2
    rates = {"lr": 1e-2 * REFERENCE_WIDTH / model.hidden_size, "muon_lr": 0.02, "norm_lr": rest}
    return rates if model.tie_word_embeddings else {**rates, "embedding_lr": rest}


def describe_rates(resolved: ResolvedRun) -> str:
    """Optimizer and peak rates in a line."""
    train = resolved.train
    if train.optimizer != "muon":
        return f"{resolved.optimizer_type}, peak rate {train.lr:g}"
    output = "embedding and output" if resolved.model.tie_word_embeddings else "output"
    kinds = {output: train.lr, "embedding": train.embedding_lr, "norms": train.norm_lr}
    rest = ", ".join(f"{kind} {rate:.3g}" for kind, rate in kinds.items() if rate is not None)
    return f"muon, peak rate {train.muon_lr:g}; adamw for {rest}"


def check_muon(resolved: ResolvedRun) -> None:
    """Refuse what has no effect, or what Muon cannot do.

    Raises:
        UserError: naming the setting.
    """
    train = resolved.train
    if train.optimizer != "muon":
        _refuse_rates(train, ("muon_lr", "embedding_lr", "norm_lr"), f"{train.optimizer}; leave it out, or use muon")
        return
    if resolved.model.tie_word_embeddings:
        _refuse_rates(train, ("embedding_lr",), "an embedding that is the output matrix too: that has lr; leave it out")
    if not resolved.num_muon_params:
        raise UserError("optimizer: muon has nothing to update: it takes no adapters, embeddings or norms; use adamw")
    offload = resolved.ds.get("zero_optimization", {}).get("offload_optimizer") or {}
    if "nvme" in (resolved.zero.offload_optimizer, resolved.zero.offload_param):
        raise UserError("optimizer: muon keeps nothing on nvme; offload to cpu, or use adamw")
    if train.schedule == "deepspeed":
        raise UserError("optimizer: muon has two rates, and a DeepSpeed scheduler knows one; use --schedule, or adamw")
    for key, off in (("ratio", 1), ("super_offload", False)):
        if offload.get(key, off) != off:
            raise UserError(
                f"DeepSpeed config: offload_optimizer.{key} is of DeepSpeed's Adam; remove it, or use adamw"
            )


def _refuse_rates(train: TrainConfig, names: tuple[str, ...], on: str) -> None:
    for name in names:
        if getattr(train, name) is not None:
            raise UserError(f"{name}: {getattr(train, name)} has no effect on {on}")
