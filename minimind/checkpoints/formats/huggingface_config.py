"""Convert a model's config to the form of transformers, vLLM and llama.cpp, and back.

A model gets the name of an architecture only if that architecture computes exactly the same function.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from minimind.errors import UserError
from minimind.model.config import ModelConfig
from minimind.schema import convert

OWN_KEY = "minimind"
"""Key of config.json that holds our complete config; other programs ignore it."""

_NAMES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
}
_SAME_NAMES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "initializer_range",
    "max_position_embeddings", "rms_norm_eps", "attention_dropout", "tie_word_embeddings", "bos_token_id",
)  # fmt: skip
_EXPERT_NAMES = (
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "router_aux_loss_coef"
)  # fmt: skip
_TRAINED = "original_max_position_embeddings"
# What each way of stretching the context reads beside its factor, and our name of it.
_ROPE_NAMES: dict[str, dict[str, str]] = {
    "yarn": {
        _TRAINED: f"rope_{_TRAINED}",
        "beta_fast": "rope_beta_fast",
        "beta_slow": "rope_beta_slow",
        "attention_factor": "rope_attention_factor",
    },
    "llama3": {_TRAINED: f"rope_{_TRAINED}", "high_freq_factor": "rope_beta_fast", "low_freq_factor": "rope_beta_slow"},
    "linear": {},
}
# Architectures whose foreign models can be read, and what transformers takes there for a field that is left out. Of
# the others only exports of this project can be read.
_READABLE: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8},
    "qwen2": {"max_position_embeddings": 32768, "attention_bias": True},
    "qwen3": {"max_position_embeddings": 32768, "head_dim": 128},
    "qwen3_moe": {
        "max_position_embeddings": 32768,
        **dict(zip(_EXPERT_NAMES, (128, 8, 768, False, 0.001), strict=True)),
    },
}


def choose_architecture(config: ModelConfig) -> str:
    """The `model_type` of transformers that computes this model.

    Raises:
        UserError: there is none; the message says why.
    """
    if config.attention_bias and (config.qk_norm or config.use_moe):
        reason = f"attention_bias with {'qk_norm' if config.qk_norm else 'experts'}"
    elif not config.use_moe:
        return "qwen3" if config.qk_norm else "qwen2" if config.attention_bias else "llama"
    elif config.moe_residual:
        reason = "residual experts (moe_residual)"
    elif config.scoring_func == "sigmoid":
        if config.n_shared_experts:
            return "glm4_moe"
        reason = "a sigmoid router without shared experts (n_shared_experts=0)"
    elif config.routed_scaling_factor != 1:
        reason = f"a softmax router with routed_scaling_factor={config.routed_scaling_factor}"
    elif config.qk_norm and config.n_shared_experts:
        reason = f"n_shared_experts={config.n_shared_experts} with a softmax router and qk_norm"
    elif config.qk_norm and config.router_bias_update_rate:
        reason = "a selection bias (router_bias_update_rate) with a softmax router and qk_norm"
    elif config.qk_norm:
        return "qwen3_moe"
    elif not config.norm_topk_prob:
        reason = "experts with norm_topk_prob=false and without qk_norm"
    elif config.rope_scaling_factor != 1:
        reason = "scaled positions (rope_scaling_factor) with experts and without qk_norm"
    else:
        return "ernie4_5_moe"
    raise UserError(f"no architecture of transformers is equal to this model: {reason}; use --format minimind")


def to_huggingface(config: ModelConfig) -> dict[str, Any]:
    """The content of config.json, without the type of the weights.

    Raises:
        UserError: no architecture computes this model.
    """
    kind = choose_architecture(config)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling_factor != 1:
        rope |= {"rope_type": config.rope_scaling_type, "factor": config.rope_scaling_factor}
        names = _ROPE_NAMES[config.rope_scaling_type]
        values = {theirs: getattr(config, ours) for theirs, ours in names.items()}
        values |= {_TRAINED: config.trained_length} if _TRAINED in names else {}
        rope |= {name: value for name, value in values.items() if value is not None}
    return {
        "architectures": [_NAMES[kind]],
        "model_type": kind,
        **{name: getattr(config, name) for name in _SAME_NAMES},
        # No pad_token_id: transformers would keep the row of that token, which ends documents, from being trained.
        "eos_token_id": config.eos_token_id,
        "intermediate_size": config.feed_forward_size,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "attention_bias": config.attention_bias,
        "use_cache": True,
        # Versions before transformers 5, and other programs, read these two; later ones read the third.
        "rope_theta": config.rope_theta,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "rope_parameters": rope,
        **_own_fields(config, kind),
        OWN_KEY: config.to_dict(),
    }


def _own_fields(config: ModelConfig, kind: str) -> dict[str, Any]:
    """Fields of one architecture alone."""
    if kind == "llama":
        return {"mlp_bias": False}
    no_window = {"use_sliding_window": False, "sliding_window": None}
    if kind in ("qwen2", "qwen3"):
        return no_window
    fields: dict[str, Any] = {
        "router_aux_loss_coef": config.router_aux_loss_coef,
        "output_router_logits": False,
        "moe_intermediate_size": config.expert_feed_forward_size,
    }
    if kind == "ernie4_5_moe":
        return fields | {
            "use_bias": False,
            "moe_k": config.num_experts_per_tok,
            "moe_num_experts": config.num_experts,
            "moe_num_shared_experts": config.n_shared_experts,
            "moe_layer_start_index": config.first_k_dense_replace,
            "moe_layer_end_index": config.num_hidden_layers - 1,
            "moe_layer_interval": 1,
        }
    fields |= {"num_experts_per_tok": config.num_experts_per_tok, "norm_topk_prob": config.norm_topk_prob}
    if kind == "qwen3_moe":
        dense = list(range(config.first_k_dense_replace))
        fields |= {"num_experts": config.num_experts, "decoder_sparse_step": 1, "mlp_only_layers": dense}
        return fields | no_window
    return fields | {
        "n_routed_experts": config.num_experts,
        "n_shared_experts": config.n_shared_experts,
        "routed_scaling_factor": config.routed_scaling_factor,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": config.first_k_dense_replace,
        "use_qk_norm": config.qk_norm,
        "partial_rotary_factor": 1.0,
        "num_nextn_predict_layers": 0,
    }


def from_huggingface(values: Mapping[str, Any]) -> ModelConfig:
    """Our config for a foreign model.

    Raises:
        UserError: an unsupported architecture, or one with a feature that our model lacks.
    """
    kind = str(values.get("model_type"))
    if isinstance(values.get(OWN_KEY), Mapping):
        config = ModelConfig.from_dict(values[OWN_KEY])
        # Ours is valid only if the other fields have not been edited.
        if all(values.get(key) == value for key, value in to_huggingface(config).items() if key != OWN_KEY):
            return config
    if kind not in _READABLE:
        raise UserError(f"model_type {kind!r} is not one of {', '.join(_READABLE)}, nor an export of this project")
    _refuse_extras(values, kind)
    missing = [name for name in _SAME_NAMES[:4] if values.get(name) is None]
    if missing:
        raise UserError(f"{missing[0]} is missing")
    given = {name: value for name, value in values.items() if value is not None}
    names = [*_SAME_NAMES, "intermediate_size", "head_dim", "eos_token_id", "pad_token_id"]
    fields = {"num_key_value_heads": given["num_attention_heads"], "tie_word_embeddings": False, **_READABLE[kind]}
    if kind == "qwen3_moe":
        names += _EXPERT_NAMES
        dense = given.get("mlp_only_layers") or []
        if not isinstance(dense, list) or not all(layer in dense for layer in range(len(dense))):
            raise UserError(f"mlp_only_layers {dense}: only the first layers can be dense")
        fields |= {"use_moe": True, "first_k_dense_replace": len(dense)}
        given.setdefault("num_experts", given.get("num_local_experts", fields["num_experts"]))
    fields |= {name: given[name] for name in names if name in given}
    if isinstance(ends := fields.get("eos_token_id"), list) and ends:
        fields["eos_token_id"] = ends[0]
    fields |= _read_rope(given, fields["max_position_embeddings"])
    config = ModelConfig.from_dict({**fields, "qk_norm": kind in ("qwen3", "qwen3_moe")})
    is_usual = config.head_size * config.num_attention_heads == config.hidden_size
    return replace(config, head_dim=None) if is_usual else config


def _refuse_extras(values: Mapping[str, Any], kind: str) -> None:
    layers = values.get("layer_types") or []
    other = [layer for layer in layers if layer != "full_attention"] if isinstance(layers, list) else layers
    longest = values.get("max_position_embeddings") or _READABLE[kind]["max_position_embeddings"]
    window = values.get("sliding_window", 4096) if kind == "mistral" else None
    for holds, what in (
        (values.get("hidden_act", "silu") != "silu", f"hidden_act {values.get('hidden_act')!r}"),
        (values.get("attention_bias") and kind != "qwen2", "attention_bias"),
        (values.get("mlp_bias"), "mlp_bias"),
        (values.get("use_sliding_window"), "use_sliding_window"),
        (window is not None and window != longest, f"sliding_window {window!r}"),
        (other, f"layer_types with {other}"),
        (values.get("partial_rotary_factor", 1) != 1, f"partial_rotary_factor {values.get('partial_rotary_factor')}"),
        (values.get("decoder_sparse_step", 1) != 1, "decoder_sparse_step above 1"),
        (values.get("quantization_config"), "quantized weights"),
    ):
        if holds:
            raise UserError(f"{what} is not supported by this model")


def _read_rope(values: Mapping[str, Any], longest: Any) -> dict[str, Any]:
    """Our fields of rotary positions. A context that is not stretched is the one of training."""
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        rope |= convert(values.get(name, {}), dict, name)
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    fields = {"rope_theta": rope.get("rope_theta", values.get("rope_theta", 10000.0)), f"rope_{_TRAINED}": longest}
    if kind == "default" or (kind in _ROPE_NAMES and rope.get("factor") == 1):
        return fields
    if kind not in _ROPE_NAMES or rope.get("mscale") or rope.get("truncate") is False:
        raise UserError(f"rotary positions of type {kind!r} with {sorted(rope)} are not supported by this model")
    missing = {"factor", *(["low_freq_factor", "high_freq_factor"] if kind == "llama3" else [])} - rope.keys()
    if missing:
        raise UserError(f"rotary positions of type {kind!r} have no {min(missing)}")
    fields |= {"rope_scaling_type": kind, "rope_scaling_factor": rope["factor"]}
    return fields | {ours: rope[theirs] for theirs, ours in _ROPE_NAMES[kind].items() if rope.get(theirs) is not None}
