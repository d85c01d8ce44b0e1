"""The formula of activations that the documentation prints, as the tests check it."""

from minimind.model.config import ModelConfig


def layer_activations_per_token(config: ModelConfig) -> int:
    """Elements that the backward of one block keeps for a token on a GPU, with fused attention and norms.

    The input of each norm and its output (4 x hidden), queries and keys before their norms, queries, keys and values
    as attention takes them, its output, and four feed-forward widths (gate, up, SiLU of gate, product).
    """
    query = config.num_attention_heads * config.head_size
    key = config.num_key_value_heads * config.head_size
    before_norm = query + key if config.qk_norm else 0
    visited = config.num_experts_per_tok + config.n_shared_experts + config.moe_residual
    mixed = 4 * (config.expert_feed_forward_size * visited if config.use_moe else config.feed_forward_size)
    if config.use_moe:
        mixed += 2 * config.hidden_size * config.num_experts_per_tok  # dispatched, and combined
        mixed += 2 * config.hidden_size * config.moe_residual
    return 4 * config.hidden_size + before_norm + 2 * (query + key) + mixed
