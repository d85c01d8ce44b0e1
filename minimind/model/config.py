"""The shape of a MiniMind model: one frozen dataclass, its presets, and what follows from it by arithmetic.

Standard library only, so that a plan, a flag parser or a shard check can know a model without torch. Refuses to know
how the model is computed, trained or stored.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from minimind.model import arithmetic, limits
from minimind.schema import check_fields


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides a model's parameters and its forward pass. Field names are Hugging Face's.

    A value is checked when the object is made; a bad one raises `UserError`. What a field set to None stands for is a
    property (`head_size`, `feed_forward_size`, `expert_feed_forward_size`), never written back into the field.
    """

    vocab_size: int = 6400
    """Number of token ids, the rows of the embedding."""
    hidden_size: int = 768
    """Width of the residual stream."""
    num_hidden_layers: int = 8
    """Number of transformer blocks."""
    num_attention_heads: int = 8
    """Number of query heads."""
    num_key_value_heads: int = 4
    """Number of key and value heads: equal to the query heads is MHA, 1 is MQA, between them GQA."""
    head_dim: int | None = None
    """Width of one head; None means hidden_size / num_attention_heads."""
    intermediate_size: int | None = None
    """Width of the feed-forward; None means hidden_size * pi, rounded up to a multiple of 64."""
    max_position_embeddings: int = 32768
    """Longest sequence the model accepts, in tokens."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in every RMSNorm."""
    rope_theta: float = 1e6
    """Base of the rotary frequencies."""
    rope_scaling_factor: float = 1.0
    """YaRN: how many times the context is stretched beyond the trained one; 1 turns YaRN off."""
    rope_original_max_position_embeddings: int = 2048
    """YaRN: the context length of training, in tokens."""
    rope_beta_fast: float = 32.0
    """YaRN: frequencies that turn more often than this in the trained context are kept."""
    rope_beta_slow: float = 1.0
    """YaRN: frequencies that turn less often than this in the trained context are divided by the factor."""
    rope_attention_factor: float | None = None
    """YaRN: scale of the rotated queries and keys; None means 0.1 * ln(rope_scaling_factor) + 1."""
    tie_word_embeddings: bool = True
    """Use the embedding matrix as the output matrix too."""
    qk_norm: bool = True
    """RMSNorm over each query and key head before the rotation."""
    dropout: float = 0.0
    """Dropout on the embedding and on what each block adds to the residual stream, in training."""
    attention_dropout: float = 0.0
    """Dropout on the attention weights, in training."""
    flash_attn: bool = True
    """Fused attention kernels; false computes the score matrix explicitly."""
    initializer_range: float = 0.02
    """Standard deviation of fresh weights; matrices that write to the residual stream divide it by sqrt(2 * layers)."""
    bos_token_id: int = 1
    """Id of the token that opens a turn."""
    eos_token_id: int = 2
    """Id of the token that ends generation."""
    pad_token_id: int = 0
    """Id that fills short rows of a batch."""
    z_loss_coef: float = 0.0
    """Weight of the squared log-partition of the output logits in the training loss; 0 is off."""

    use_moe: bool = False
    """Mixture of experts in place of the feed-forward."""
    num_experts: int = 4
    """Routed experts in a layer."""
    num_experts_per_tok: int = 1
    """Routed experts a token visits."""
    n_shared_experts: int = 0
    """Experts that every token visits, computed as one feed-forward of their joint width."""
    moe_residual: bool = False
    """A feed-forward of one expert's width beside the experts; each token weighs the two (arXiv 2201.05596)."""
    moe_intermediate_size: int | None = None
    """Width of one expert; None means the width of the dense feed-forward."""
    norm_topk_prob: bool = True
    """Divide the chosen experts' scores by their sum."""
    scoring_func: str = "softmax"
    """Router scores: softmax over the experts, or sigmoid of each."""
    routed_scaling_factor: float = 1.0
    """Multiplies the weights of the routed experts."""
    router_aux_loss_coef: float = 5e-4
    """Weight of the load-balancing loss; 0 is off."""
    seq_aux: bool = False
    """Balance the load within each sequence instead of over the batch."""
    router_z_loss_coef: float = 0.0
    """Weight of the squared log-partition of the router logits; 0 is off."""
    router_bias_update_rate: float = 0.0
    """Step of the selection bias that balances the load without a loss (DeepSeek-V3); 0 is off."""
    first_k_dense_replace: int = 0
    """This many first layers keep the dense feed-forward."""

    def __post_init__(self) -> None:
        self.validate()

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def feed_forward_size(self) -> int:
        """Width of the dense feed-forward."""
        if self.intermediate_size is None:
            return arithmetic.default_intermediate_size(self.hidden_size)
        return self.intermediate_size

    @property
    def expert_feed_forward_size(self) -> int:
        """Width of one routed expert."""
        return self.feed_forward_size if self.moe_intermediate_size is None else self.moe_intermediate_size

    def has_experts(self, layer: int) -> bool:
        """Whether block `layer` (from 0) holds experts instead of a dense feed-forward."""
        return self.use_moe and layer >= self.first_k_dense_replace

    def num_params(self) -> int:
        """Trainable parameters of the whole model; a tied embedding counts once."""
        return arithmetic.count_params(self)

    def num_active_params(self) -> int:
        """Parameters that one token uses: all but the routed experts it does not visit."""
        return arithmetic.count_active_params(self)

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations of training (forward and backward) on one token in sequences of `seq_len` tokens.

        Matrix products only, 2*m*n*k each, three times for forward and the two products of backward; the output
        matrix included, the embedding look-up not; causal attention counted as the (seq_len + 1) / 2 keys that a
        token sees on average. Recomputation under activation checkpointing is no useful work and is not counted.
        """
        return arithmetic.count_flops_per_token(self, seq_len)

    def to_dict(self) -> dict[str, Any]:
        """Every field and its value, fit for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """The config of these fields, defaults for the rest. Raises `UserError` on an unknown key or a wrong type."""
        return cls(**check_fields(cls, values, "model config"))

    def validate(self) -> None:
        """Raise `UserError` naming the first field whose value cannot work, the value, and what would."""
        check_fields(type(self), asdict(self), "model config")
        limits.check_config(self)


# minimind*: the published MiniMind models. tiny, quickstart: for tests and for the first minutes on a CPU.
# small, medium, large: sizes to grow into, of present-day shape (deep and narrow, GQA, QK-norm, tied, widths that are
# multiples of 128). A vocabulary of 32000 gives shorter sequences for the same text than one of 6400, but its matrix
# would be a quarter of `small`; in `medium` it is a sixth, in `large` a sixteenth, so they take it.
PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    ),
    "quickstart": ModelConfig(
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    ),
    "minimind2-small": ModelConfig(
        hidden_size=512,
        num_hidden_layers=8,
        num_key_value_heads=2,
        intermediate_size=1408,
        rms_norm_eps=1e-5,
        qk_norm=False,
    ),
    "minimind2": ModelConfig(
        hidden_size=768,
        num_hidden_layers=16,
        num_key_value_heads=2,
        intermediate_size=2048,
        rms_norm_eps=1e-5,
        qk_norm=False,
    ),
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
    "minimind2-moe": ModelConfig(
        hidden_size=640,
        num_hidden_layers=8,
        num_key_value_heads=2,
        intermediate_size=1728,
        rms_norm_eps=1e-5,
        qk_norm=False,
        use_moe=True,
        num_experts_per_tok=2,
        n_shared_experts=1,
        seq_aux=True,
        router_aux_loss_coef=0.01,
    ),
    "tiny-moe": ModelConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
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
        num_hidden_layers=8,
        use_moe=True,
        num_experts=64,
        num_experts_per_tok=4,
        n_shared_experts=1,
        moe_intermediate_size=256,
        router_aux_loss_coef=1e-3,
    ),
}
