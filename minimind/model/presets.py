"""The shapes of model that have a name."""

from dataclasses import replace

from minimind.model.config import ModelConfig

_TINY = ModelConfig(
    hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512
)
_MINIMIND2 = ModelConfig(
    num_hidden_layers=16, num_key_value_heads=2, intermediate_size=2048, rms_norm_eps=1e-5, qk_norm=False
)

# minimind*: the published MiniMind models. tiny, quickstart: for tests and for the first minutes on a CPU.
# small, medium, large: sizes to grow into, of present-day shape (deep and narrow, GQA, QK-norm, tied, widths that are
# multiples of 128). A vocabulary of 32000 gives shorter sequences for the same text than one of 6400, but its matrix
# would be a quarter of `small`; in `medium` it is a sixth, in `large` a sixteenth, so they take it.
PRESETS: dict[str, ModelConfig] = {
    "tiny": _TINY,
    "quickstart": replace(_TINY, hidden_size=256, max_position_embeddings=4096),
    "minimind2-small": replace(_MINIMIND2, hidden_size=512, num_hidden_layers=8, intermediate_size=1408),
    "minimind2": _MINIMIND2,
    "minimind3": ModelConfig(),
    "small": ModelConfig(hidden_size=512, num_hidden_layers=14, intermediate_size=1664),
    "medium": ModelConfig(vocab_size=32000, hidden_size=1024, num_hidden_layers=14, intermediate_size=2816),
    "large": ModelConfig(
        vocab_size=32000,
        hidden_size=2048,
        num_hidden_layers=20,
        num_attention_heads=16,
        num_key_value_heads=8,
        intermediate_size=5632,
    ),
    # 4 routed experts in each layer, one a token.
    "minimind3-moe": ModelConfig(use_moe=True),
    "minimind2-moe": replace(
        _MINIMIND2,
        hidden_size=640,
        num_hidden_layers=8,
        intermediate_size=1728,
        use_moe=True,
        num_experts_per_tok=2,
        n_shared_experts=1,
        seq_aux=True,
        router_aux_loss_coef=0.01,
    ),
    "tiny-moe": replace(
        _TINY,
        use_moe=True,
        num_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=64,
        router_aux_loss_coef=0.01,
    ),
    # Many small experts, for work on scaling (arXiv 2401.06066).
    "moe-64e": ModelConfig(
        hidden_size=512,
        use_moe=True,
        num_experts=64,
        num_experts_per_tok=4,
        n_shared_experts=1,
        moe_intermediate_size=256,
        router_aux_loss_coef=1e-3,
    ),
}
