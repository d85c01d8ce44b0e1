"""Which values of a model's config can work: one check after the other, each naming the field, its value and the fix.

Standard library only. Refuses to know the types (`schema`) and what the values are used for.
"""

from dataclasses import fields
from typing import TYPE_CHECKING, NoReturn

from minimind.errors import UserError

if TYPE_CHECKING:
    from minimind.model.config import ModelConfig

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_original_max_position_embeddings",
    "rope_beta_fast",
    "rope_beta_slow",
    "rope_attention_factor",
    "initializer_range",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "routed_scaling_factor",
)
_NOT_NEGATIVE = (
    "z_loss_coef",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "router_bias_update_rate",
    "n_shared_experts",
    "first_k_dense_replace",
)
# What only an MoE layer reads: set on a dense model it would be ignored, and an ignored setting is an error.
_EXPERT_FIELDS = (
    "num_experts",
    "num_experts_per_tok",
    "n_shared_experts",
    "moe_residual",
    "moe_intermediate_size",
    "norm_topk_prob",
    "scoring_func",
    "routed_scaling_factor",
    "router_aux_loss_coef",
    "seq_aux",
    "router_z_loss_coef",
    "router_bias_update_rate",
    "first_k_dense_replace",
)


def check_config(config: "ModelConfig") -> None:
    """Raise `UserError` for the first field whose value cannot work."""
    _check_ranges(config)
    _check_attention(config)
    _check_experts(config)


def _refuse(config: "ModelConfig", name: str, fix: str) -> NoReturn:
    raise UserError(f"model config: {name}={getattr(config, name)!r} {fix}")


def _check_ranges(config: "ModelConfig") -> None:
    for name in _POSITIVE:
        value = getattr(config, name)
        if value is not None and not 0 < value < float("inf"):
            _refuse(config, name, "must be a finite number above 0")
    for name in _NOT_NEGATIVE:
        if not 0 <= getattr(config, name) < float("inf"):
            _refuse(config, name, "must be 0 or a finite number above")
    for name in ("dropout", "attention_dropout"):
        if not 0 <= getattr(config, name) < 1:
            _refuse(config, name, "must be at least 0 and below 1")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if not 0 <= getattr(config, name) < config.vocab_size:
            _refuse(config, name, f"must be a token id below vocab_size={config.vocab_size}")


def _check_attention(config: "ModelConfig") -> None:
    heads = config.num_attention_heads
    if config.head_dim is None and config.hidden_size % heads:
        _refuse(config, "hidden_size", f"does not divide by num_attention_heads={heads}; change one or set head_dim")
    if config.head_size % 2:
        name = "hidden_size" if config.head_dim is None else "head_dim"
        _refuse(config, name, f"gives heads of odd width {config.head_size}; rotary positions need an even one")
    if heads % config.num_key_value_heads:
        _refuse(config, "num_key_value_heads", f"does not divide num_attention_heads={heads}")
    if config.rope_scaling_factor < 1 or config.rope_scaling_factor == float("inf"):
        _refuse(config, "rope_scaling_factor", "must be 1 (no YaRN) or above")
    if config.rope_beta_fast <= config.rope_beta_slow:
        _refuse(config, "rope_beta_fast", f"must be above rope_beta_slow={config.rope_beta_slow}")
    if config.rope_attention_factor is not None and config.rope_scaling_factor == 1:
        _refuse(config, "rope_attention_factor", "has no effect without YaRN; set rope_scaling_factor above 1")


def _check_experts(config: "ModelConfig") -> None:
    if not config.use_moe:
        for field in fields(config):
            if field.name in _EXPERT_FIELDS and getattr(config, field.name) != field.default:
                _refuse(config, field.name, f"has no effect on a dense model; set use_moe or leave it {field.default}")
        return
    if config.scoring_func not in ("softmax", "sigmoid"):
        _refuse(config, "scoring_func", "must be 'softmax' or 'sigmoid'")
    if config.num_experts_per_tok > config.num_experts:
        _refuse(config, "num_experts_per_tok", f"is above num_experts={config.num_experts}")
    if config.first_k_dense_replace >= config.num_hidden_layers:
        layers = config.num_hidden_layers
        _refuse(config, "first_k_dense_replace", f"leaves no layer for experts; give less than {layers}")
