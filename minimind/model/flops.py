"""Parameter and operation counts of a model shape: plain integer arithmetic over the config's fields.

Standard library only. Refuses to know torch: that the counts are those of the real modules is held by the tests.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minimind.model.config import ModelConfig


def count_attention_matrices(config: "ModelConfig") -> int:
    """Elements of one layer's query, key, value and output matrices."""
    query = config.num_attention_heads * config.head_size
    key = config.num_key_value_heads * config.head_size
    return config.hidden_size * (2 * query + 2 * key)


def count_feed_forward_matrices(config: "ModelConfig", layer: int, *, active: bool) -> int:
    """Elements of the matrices in block `layer`'s feed-forward or experts; `active`: those that one token uses."""
    if not config.has_experts(layer):
        return 3 * config.hidden_size * config.feed_forward_size
    experts = config.num_experts_per_tok if active else config.num_experts
    router = config.hidden_size * config.num_experts
    expert = 3 * config.hidden_size * config.expert_feed_forward_size
    residual = expert + 2 * config.hidden_size if config.moe_residual else 0
    return router + (experts + config.n_shared_experts) * expert + residual


def count_params(config: "ModelConfig", *, active: bool = False) -> int:
    """Trainable parameters, a tied embedding once; `active`: without the routed experts that a token does not visit."""
    norms = 2 * config.hidden_size + (2 * config.head_size if config.qk_norm else 0)
    layers = range(config.num_hidden_layers)
    blocks = sum(count_feed_forward_matrices(config, layer, active=active) for layer in layers)
    blocks += config.num_hidden_layers * (count_attention_matrices(config) + norms)
    blocks += sum(2 for layer in layers if config.moe_residual and config.has_experts(layer))  # biases
    embedding = config.vocab_size * config.hidden_size
    return blocks + config.hidden_size + embedding * (1 if config.tie_word_embeddings else 2)


def count_active_params(config: "ModelConfig") -> int:
    """Parameters that one token uses."""
    return count_params(config, active=True)


def count_flops_per_token(config: "ModelConfig", seq_len: int) -> int:
    """Training operations a token in causal sequences of `seq_len`; see `ModelConfig.flops_per_token`."""
    layers = range(config.num_hidden_layers)
    matrices = sum(count_feed_forward_matrices(config, layer, active=True) for layer in layers)
    matrices += config.num_hidden_layers * count_attention_matrices(config)
    matrices += config.vocab_size * config.hidden_size
    # Scores and weighted values are 2 * head_size operations each for every visible key, of which there are
    # (seq_len + 1) / 2 on average.
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_size * 2 * (seq_len + 1)
    return 3 * (2 * matrices + attention)
