"""Convert a model's config to the form of transformers, vLLM and llama.cpp, and back.

A model gets the name of an architecture only if that architecture computes exactly the same function.
"""

from collections.abc import Mapping
from typing import Any

from minimind.errors import UserError
from minimind.model.config import ModelConfig

OWN_KEY = "minimind"
"""Key of config.json that holds our complete config; other programs ignore it."""

_NAMES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
}
_SAME_NAMES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "initializer_range",
    "bos_token_id", "pad_token_id",
)  # fmt: skip
READABLE = ("llama", "qwen3", "qwen3_moe")
"""Architectures whose foreign models can be read; of the others, only exports of this project."""


def choose_architecture(config: ModelConfig) -> str:
    """The `model_type` of transformers that computes this model.

    Raises:
        UserError: there is none; the message says why.
    """
    if not config.use_moe:
        return "qwen3" if config.qk_norm else "llama"
    if config.moe_residual:
        raise UserError("no architecture of transformers has residual experts (moe_residual); use --format minimind")
    plain_softmax = config.scoring_func == "softmax" and config.routed_scaling_factor == 1
    if plain_softmax and config.qk_norm and not config.n_shared_experts and not config.router_bias_update_rate:
        return "qwen3_moe"
    if plain_softmax and not config.qk_norm and config.norm_topk_prob and config.rope_scaling_factor == 1:
        return "ernie4_5_moe"
    if config.scoring_func == "sigmoid" and config.n_shared_experts:
        return "glm4_moe"
    raise UserError(f"no architecture of transformers is equal to this model: {_reason(config)}; use --format minimind")


def _reason(config: ModelConfig) -> str:
    if config.scoring_func == "sigmoid":
        return "a sigmoid router without shared experts (n_shared_experts=0)"
    if config.routed_scaling_factor != 1:
        return f"a softmax router with routed_scaling_factor={config.routed_scaling_factor}"
    if config.n_shared_experts:
        return f"n_shared_experts={config.n_shared_experts} with a softmax router and qk_norm"
    if config.router_bias_update_rate:
        return "a selection bias (router_bias_update_rate) with a softmax router and qk_norm"
    if not config.norm_topk_prob:
        return "experts with norm_topk_prob=false and without qk_norm"
    return "YaRN (rope_scaling_factor) with experts and without qk_norm"


def to_huggingface(config: ModelConfig) -> dict[str, Any]:
    """The content of config.json, without the type of the weights.

    Raises:
        UserError: no architecture computes this model.
    """
    kind = choose_architecture(config)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling_factor != 1:
        rope |= {
            "rope_type": "yarn",
            "factor": config.rope_scaling_factor,
            "original_max_position_embeddings": config.rope_original_max_position_embeddings,
            "beta_fast": config.rope_beta_fast,
            "beta_slow": config.rope_beta_slow,
        }
        if config.rope_attention_factor is not None:
            rope["attention_factor"] = config.rope_attention_factor
    values = {
        "architectures": [_NAMES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.feed_forward_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        # Versions before transformers 5, and other programs, read these two; later ones read the third.
        "rope_theta": config.rope_theta,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "rope_parameters": rope,
        "attention_bias": False,
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        # No pad_token_id: transformers would keep the row of that token, which ends documents, from being trained.
    }
    return values | _own_fields(config, kind) | {OWN_KEY: config.to_dict()}


def _own_fields(config: ModelConfig, kind: str) -> dict[str, Any]:
    """Fields of one architecture alone."""
    if kind == "llama":
        return {"mlp_bias": False}
    if kind == "qwen3":
        return {"use_sliding_window": False, "sliding_window": None}
    router = {"router_aux_loss_coef": config.router_aux_loss_coef, "output_router_logits": False}
    size, first = config.expert_feed_forward_size, config.first_k_dense_replace
    if kind == "ernie4_5_moe":
        return {
            **router,
            "use_bias": False,
            "moe_intermediate_size": size,
            "moe_k": config.num_experts_per_tok,
            "moe_num_experts": config.num_experts,
            "moe_num_shared_experts": config.n_shared_experts,
            "moe_layer_start_index": first,
            "moe_layer_end_index": config.num_hidden_layers - 1,
            "moe_layer_interval": 1,
        }
    chosen = {
        **router,
        "moe_intermediate_size": size,
        "num_experts_per_tok": config.num_experts_per_tok,
        "norm_topk_prob": config.norm_topk_prob,
    }
    if kind == "qwen3_moe":
        return {
            **chosen,
            "num_experts": config.num_experts,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(range(first)),
            "use_sliding_window": False,
            "sliding_window": None,
        }
    return {
        **chosen,
        "n_routed_experts": config.num_experts,
        "n_shared_experts": config.n_shared_experts,
        "routed_scaling_factor": config.routed_scaling_factor,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": first,
        "use_qk_norm": config.qk_norm,
        "partial_rotary_factor": 1.0,
        "num_nextn_predict_layers": 0,
    }


def from_huggingface(values: Mapping[str, Any]) -> ModelConfig:
    """Our config for a foreign model.

    Raises:
        UserError: an unsupported architecture, or one with a feature that our model lacks.
    """
    kind = values.get("model_type")
    if isinstance(values.get(OWN_KEY), Mapping):
        config = ModelConfig.from_dict(values[OWN_KEY])
        # Ours is valid only if the other fields have not been edited.
        if all(values.get(key) == value for key, value in to_huggingface(config).items()):
            return config
    if kind not in READABLE:
        raise UserError(f"model_type {kind!r} is not one of {', '.join(READABLE)}, nor an export of this project")
    _refuse_extras(values)
    hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
    head_dim = values.get("head_dim", 128 if kind == "qwen3" else None)
    if head_dim and hidden and heads and head_dim * heads == hidden:
        head_dim = None
    eos = values.get("eos_token_id")
    fields = {
        **{name: values.get(name) for name in _SAME_NAMES},
        "num_key_value_heads": values.get("num_key_value_heads") or heads,
        "max_position_embeddings": values.get("max_position_embeddings", 2048 if kind == "llama" else 32768),
        "rms_norm_eps": values.get("rms_norm_eps", 1e-6),
        "tie_word_embeddings": values.get("tie_word_embeddings", False),
        "eos_token_id": eos[0] if isinstance(eos, list) and eos else eos,
        **_read_rope(values),
    }
    missing = [name for name in ("vocab_size", "hidden_size", "num_hidden_layers") if fields[name] is None]
    if missing or heads is None:
        raise UserError(f"{(missing or ['num_attention_heads'])[0]} is missing")
    given = {name: value for name, value in fields.items() if value is not None}
    given |= {"qk_norm": kind != "llama", "head_dim": head_dim}
    return ModelConfig.from_dict(given | (_read_experts(values) if kind == "qwen3_moe" else {}))


def _refuse_extras(values: Mapping[str, Any]) -> None:
    layers = [layer for layer in values.get("layer_types") or [] if layer != "full_attention"]
    for holds, what in (
        (values.get("hidden_act", "silu") != "silu", f"hidden_act {values.get('hidden_act')!r}"),
        (values.get("attention_bias"), "attention_bias"),
        (values.get("mlp_bias"), "mlp_bias"),
        (values.get("use_sliding_window"), "use_sliding_window"),
        (layers, f"layer_types with {layers[:1]}"),
        (values.get("decoder_sparse_step", 1) != 1, "decoder_sparse_step above 1"),
        (values.get("quantization_config"), "quantized weights"),
    ):
        if holds:
            raise UserError(f"{what} is not supported by this model")


def _read_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    theta = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    if kind == "default":
        return {"rope_theta": float(theta)}
    if kind != "yarn" or rope.get("mscale") or rope.get("truncate") is False:
        raise UserError(f"rotary positions of type {kind!r} with {sorted(rope)} are not supported by this model")
    factor = rope.get("attention_factor")
    trained = rope.get("original_max_position_embeddings") or values.get("max_position_embeddings")
    return {
        "rope_theta": float(theta),
        "rope_scaling_factor": float(rope["factor"]),
        "rope_original_max_position_embeddings": trained,
        "rope_beta_fast": float(rope.get("beta_fast") or 32),
        "rope_beta_slow": float(rope.get("beta_slow") or 1),
        "rope_attention_factor": None if factor is None else float(factor),
    }


def _read_experts(values: Mapping[str, Any]) -> dict[str, Any]:
    dense = values.get("mlp_only_layers") or []
    if sorted(dense) != list(range(len(dense))):
        raise UserError(f"mlp_only_layers {dense}: only the first layers can be dense")
    return {
        "use_moe": True,
        "num_experts": values.get("num_experts", values.get("num_local_experts", 128)),
        "num_experts_per_tok": values.get("num_experts_per_tok", 8),
        "moe_intermediate_size": values.get("moe_intermediate_size", 768),
        "norm_topk_prob": values.get("norm_topk_prob", False),
        "router_aux_loss_coef": values.get("router_aux_loss_coef", 0.001),
        "first_k_dense_replace": len(dense),
    }
