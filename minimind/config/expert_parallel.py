"""DeepSpeed settings of a model with experts: the backend, the `expert_parallel` block, and what the backend refuses.

The block for AutoEP is written from the model's config, every name and routing rule; nothing is left to DeepSpeed's
detection. What the engines do with it: `minimind.parallel.expert_names`.
"""

import math
from typing import Annotated, Any

from minimind.config.deepspeed_keys import AUTO, Auto
from minimind.config.overlaps import Overlaps
from minimind.config.resolved_run import ResolvedRun, ResolvedTrain
from minimind.config.run_config import RunConfig, TrainConfig
from minimind.errors import UserError
from minimind.model.config import ModelConfig
from minimind.schema import AT_LEAST_1, convert, nearest

BLOCK = "expert_parallel"

# What the user may set in the block: how AutoEP computes and communicates, not what.
_FREE_KEYS = frozenset((
    "async_split_plan", "use_grouped_mm", "disable_triton_grouped_mm", "combine_impl", "row_weighting_impl",
    "gate_up_impl", "comm_backend", "comm_num_sm", "comm_qp_margin", "comm_max_tokens_per_rank",
))  # fmt: skip
# Keys of AutoEP that would change what the model computes, or that nothing reads.
_UNUSED_KEYS = {
    "preset_model": "the names of the layers are written from the model",
    "load_balance_coeff": "the balance is the model's own: router_aux_loss_coef, router_bias_update_rate",
    "num_expert_groups": "the model does not group its experts",
    "num_limited_groups": "the model does not group its experts",
    "route_scale": "the model says routed_scaling_factor",
    "shared_experts_gate_pattern": "the shared experts have no gate",
    "expert_tensor_parallel_size": "no matrix of an expert is cut; ep_size shares the experts",
    "validate_folding_routing": "it is a check of DeepSpeed's own",
}
_TYPES = {"enabled": bool | Auto, "autoep_size": Annotated[int, AT_LEAST_1] | Auto}
# Settings that only deepspeed.moe reads.
_GATING_FIELDS = (
    "moe_drop_tokens", "moe_capacity_factor", "moe_eval_capacity_factor", "moe_min_capacity", "moe_random_selection",
    "moe_gate_noise", "moe_sample_second",
)  # fmt: skip
_CAPACITY_FIELDS = ("moe_capacity_factor", "moe_eval_capacity_factor", "moe_min_capacity", "moe_random_selection")
# torch's grouped matmul requires rows aligned to 16 bytes.
_ALIGNED_ELEMENTS = 8


def autoep_block(config: ModelConfig, ep_size: int) -> dict[str, Any]:
    """The whole `expert_parallel` section for a model of this config."""
    aligned = all(size % _ALIGNED_ELEMENTS == 0 for size in (config.hidden_size, config.expert_feed_forward_size))
    return {
        "enabled": True,
        "autoep_size": ep_size,
        "moe_layer_pattern": r"model\.layers\.\d+\.mlp",
        "router_pattern": "gate",
        "expert_pattern": "experts",
        "expert_w1": "gate_up_proj",
        "expert_w2": "down_proj",
        "expert_w3": None,
        "expert_activation": "swiglu",
        "num_experts_attr": "num_experts",
        "top_k": config.num_experts_per_tok,
        "score_func": config.scoring_func,
        "score_apply": "post",
        "route_norm": config.norm_topk_prob,
        "routed_scaling_factor": config.routed_scaling_factor,
        "has_shared_experts": config.n_shared_experts > 0,
        "shared_experts_pattern": "shared_experts",
        "use_grouped_mm": aligned,
    }


def take_experts(overlaps: Overlaps, run: RunConfig, ds: dict[str, Any]) -> dict[str, Any]:
    """`moe_backend` and `ep_size` as the run and the JSON's `expert_parallel` say them; both None in a dense model.

    Disagreements, also of the block with the model, are noted in `overlaps`.

    Raises:
        UserError: a key of the block that is unknown or not used, or a setting of experts on a dense model.
    """
    block, train = ds.get(BLOCK, {}), run.train
    enabled = block.get("enabled", AUTO)
    if not run.model.use_moe:
        _check_dense(train)
        return {"moe_backend": None, "ep_size": None}
    if train.keeps_frozen:
        # The model's own experts, on every rank: AutoEP cannot save frozen ones under ZeRO-3, and ZeRO refuses layers
        # of experts of which it has nothing to update.
        _check_frozen(train, enabled)
        return {"moe_backend": None, "ep_size": None}
    _check_keys(run.model, block)
    theirs = {True: "autoep", False: "off"}.get(enabled)
    if theirs == "off" and train.moe_backend == "deepspeed":
        theirs = None
    backend = overlaps.agree("moe_backend", train.moe_backend or "autoep", theirs, f"{BLOCK}.enabled")
    ep_size = overlaps.take("ep_size", train.ep_size, block, "autoep_size", f"{BLOCK}.") or 1
    if backend == "autoep":
        for key, ours in autoep_block(run.model, ep_size).items():
            if key not in ("enabled", "autoep_size", "use_grouped_mm") and key in block:
                overlaps.take(key, ours, block, key, f"{BLOCK}.")
                if ours is None and block[key] not in (None, AUTO):
                    overlaps.mismatches.append(
                        f"{key} is null in the run and {block[key]} as {BLOCK}.{key} in the DeepSpeed config"
                    )
    return {"moe_backend": backend, "ep_size": ep_size}


def write_experts(ds: dict[str, Any], model: ModelConfig, train: ResolvedTrain) -> None:
    """Put the resolved block into the copy of the JSON that DeepSpeed gets, or take it out."""
    block = ds.pop(BLOCK, {})
    if train.moe_backend == "autoep":
        free = {key: value for key, value in block.items() if key in _FREE_KEYS and value != AUTO}
        ds[BLOCK] = {**autoep_block(model, train.ep_size), **free}


def uses_random_routing(train: TrainConfig) -> bool:
    """Whether the choice of experts has a random part in training."""
    return train.moe_random_selection or train.moe_sample_second or train.moe_gate_noise != "none"


def check_experts(resolved: ResolvedRun) -> None:
    """Refuse, before anything is started, what the backend cannot do.

    Raises:
        UserError: naming the setting, its value and what to do.
    """
    if resolved.train.moe_backend is None:
        return
    # Beside tensor groups AutoEP shares experts over all ranks.
    num_ranks = resolved.world_size if resolved.train.tp_size > 1 else resolved.num_averaging
    _check_ep_size(resolved.train.ep_size, resolved.model.num_experts, num_ranks)
    _check_gating(resolved)
    _check_zero(resolved)


def _check_dense(train: TrainConfig) -> None:
    for name in ("moe_backend", "ep_size", *_GATING_FIELDS):
        value = getattr(train, name)
        if value != getattr(TrainConfig(), name):
            raise UserError(f"{name}: {value} has no effect on a dense model; set --use-moe, or leave it out")


def _check_frozen(train: TrainConfig, enabled: Any) -> None:
    flag = "lora_rank" if train.lora_rank else "freeze"
    default = TrainConfig()
    names = ("moe_backend", "ep_size", *_GATING_FIELDS)
    asked = [name for name in names if getattr(train, name) != getattr(default, name)]
    if asked or enabled is True:
        name = asked[0] if asked else f"{BLOCK}.enabled in the DeepSpeed config"
        raise UserError(
            f"{name}: DeepSpeed's layers of experts cannot keep frozen weights in every ZeRO stage; with {flag} each "
            f"rank has all experts; leave {name} out, or train all weights"
        )


def _check_keys(config: ModelConfig, block: dict[str, Any]) -> None:
    known = sorted((*autoep_block(config, 1), *_FREE_KEYS))
    for key, value in block.items():
        if key in _UNUSED_KEYS:
            raise UserError(f"DeepSpeed config: {BLOCK}.{key} is not used: {_UNUSED_KEYS[key]}; remove it")
        if key not in known:
            raise UserError(f"DeepSpeed config: {BLOCK}: unknown field '{key}'{nearest(key, known)}")
        if key in _TYPES:
            convert(value, _TYPES[key], f"DeepSpeed config: {BLOCK}.{key}")


def _check_ep_size(ep_size: int, num_experts: int, num_ranks: int) -> None:
    both = math.gcd(num_experts, num_ranks)
    valid = ", ".join(str(size) for size in range(1, both + 1) if both % size == 0)
    if num_experts % ep_size:
        raise UserError(f"ep_size: {ep_size} does not divide the {num_experts} experts of a layer; possible: {valid}")
    if num_ranks % ep_size:
        raise UserError(f"ep_size: {ep_size} does not divide {num_ranks} ranks; possible: {valid}")


def _check_gating(resolved: ResolvedRun) -> None:
    train, config, default = resolved.train, resolved.model, TrainConfig()
    changed = [name for name in _GATING_FIELDS if getattr(train, name) != getattr(default, name)]
    if train.moe_backend == "autoep":
        if changed:
            raise UserError(f"{changed[0]}: AutoEP drops no token and adds no noise; use --moe-backend deepspeed")
        return
    if config.router_bias_update_rate:
        raise UserError(
            f"router_bias_update_rate: {config.router_bias_update_rate}: the router of deepspeed.moe has no selection "
            "bias; use --moe-backend autoep, or router_aux_loss_coef"
        )
    top_k = config.num_experts_per_tok
    for name in changed:
        value = getattr(train, name)
        if name in _CAPACITY_FIELDS and not train.moe_drop_tokens:
            raise UserError(f"{name}: {value} has no effect where no token is dropped; add --moe-drop-tokens")
        if (name == "moe_random_selection" or value == "rsample") and top_k != 1:
            raise UserError(f"{name}: {value} is for one expert a token, and num_experts_per_tok is {top_k}")
        if name == "moe_sample_second" and top_k != 2:
            raise UserError(f"{name}: {value} is for two experts a token, and num_experts_per_tok is {top_k}")
    if train.moe_drop_tokens and train.moe_min_capacity > resolved.data.seq_len:
        raise UserError(
            f"moe_min_capacity: {train.moe_min_capacity} is above seq_len {resolved.data.seq_len}, which is all the "
            "tokens of one forward"
        )


def _check_zero(resolved: ResolvedRun) -> None:
    """What a flag can ask for; what the JSON asks for is in `deepspeed_table`."""
    train, stage = resolved.train, resolved.zero.stage
    if train.moe_backend == "deepspeed" and stage == 3:
        raise UserError("moe_backend: deepspeed does not run under ZeRO stage 3; use --moe-backend autoep, or stage 2")
    if train.precision == "fp16" and stage == 0:
        raise UserError("precision: fp16 at ZeRO stage 0 does not tell all ranks of an expert's overflow; use stage 1")
