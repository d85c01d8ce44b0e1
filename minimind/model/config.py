"""The shape of a MiniMind model: one frozen dataclass, and what follows from it by integer arithmetic.

Standard library only, so that a plan, a flag parser or a shard check can know a model without torch. That the counts
are those of the real modules is held by the tests.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal, NoReturn

from minimind.errors import UserError
from minimind.schema import ABOVE_0, AT_LEAST_0, AT_LEAST_1, Limits, check_fields

# More than anybody has built; a hostile file that asks for more is refused before memory is taken.
_MOST_PARAMS = 10**15


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides a model's parameters and its forward pass. Field names are Hugging Face's.

    A value is checked when the object is made; a bad one raises `UserError`. What a field set to None stands for is a
    property (`head_size`, `feed_forward_size`, `expert_feed_forward_size`), never written back into the field.
    """

    vocab_size: Annotated[int, AT_LEAST_1] = 6400
    """Number of token ids, the rows of the embedding."""
    hidden_size: Annotated[int, AT_LEAST_1] = 768
    """Width of the residual stream."""
    num_hidden_layers: Annotated[int, Limits(at_least=1, at_most=10_000)] = 8
    """Number of transformer blocks."""
    num_attention_heads: Annotated[int, AT_LEAST_1] = 8
    """Number of query heads."""
    num_key_value_heads: Annotated[int, AT_LEAST_1] = 4
    """Number of key and value heads: equal to the query heads is MHA, 1 is MQA, between them GQA."""
    head_dim: Annotated[int | None, AT_LEAST_1] = None
    """Width of one head; None means hidden_size / num_attention_heads."""
    intermediate_size: Annotated[int | None, AT_LEAST_1] = None
    """Width of the feed-forward; None means hidden_size * pi, rounded up to a multiple of 64."""
    max_position_embeddings: Annotated[int, AT_LEAST_1] = 32768
    """Longest sequence the model accepts, in tokens."""
    rms_norm_eps: Annotated[float, ABOVE_0] = 1e-6
    """Added to the mean square in every RMSNorm."""
    rope_theta: Annotated[float, Limits(above=1)] = 1e6
    """Base of the rotary frequencies."""
    rope_scaling_factor: Annotated[float, AT_LEAST_1] = 1.0
    """How many times the context is stretched beyond the trained one; 1 turns scaling off."""
    rope_scaling_type: Literal["yarn", "llama3", "linear"] = "yarn"
    """How it is stretched: by YaRN, as Llama 3 does it, or every frequency alike (linear)."""
    rope_original_max_position_embeddings: Annotated[int | None, AT_LEAST_1] = None
    """The context length of training, in tokens; a run fills in its own. None: not known, and YaRN takes 2048."""
    rope_beta_fast: Annotated[float, ABOVE_0] = 32.0
    """YaRN, llama3: frequencies that turn more often than this in the trained context are kept."""
    rope_beta_slow: Annotated[float, ABOVE_0] = 1.0
    """YaRN, llama3: frequencies that turn less often than this in the trained context are divided by the factor."""
    rope_attention_factor: Annotated[float | None, ABOVE_0] = None
    """YaRN: scale of the rotated queries and keys; None means 0.1 * ln(rope_scaling_factor) + 1."""
    tie_word_embeddings: bool = True
    """Use the embedding matrix as the output matrix too."""
    qk_norm: bool = True
    """RMSNorm over each query and key head before the rotation."""
    attention_bias: bool = False
    """Biases on queries, keys and values, as in Qwen2."""
    dropout: Annotated[float, Limits(at_least=0, below=1)] = 0.0
    """Dropout on the embedding and on what each block adds to the residual stream, in training."""
    attention_dropout: Annotated[float, Limits(at_least=0, below=1)] = 0.0
    """Dropout on the attention weights, in training."""
    flash_attn: bool = True
    """Fused attention kernels; false computes the score matrix explicitly."""
    initializer_range: Annotated[float, ABOVE_0] = 0.02
    """Standard deviation of fresh weights; matrices that write to the residual stream divide it by sqrt(2 * layers)."""
    bos_token_id: int = 1
    """Id of the token that opens a turn."""
    eos_token_id: int = 2
    """Id of the token that ends generation."""
    pad_token_id: int = 0
    """Id that fills short rows of a batch."""
    z_loss_coef: Annotated[float, AT_LEAST_0] = 0.0
    """Weight of the squared log-partition of the output logits in the training loss; 0 is off."""

    use_moe: bool = False
    """Mixture of experts in place of the feed-forward."""
    num_experts: Annotated[int, Limits(at_least=1, at_most=100_000)] = 4
    """Routed experts in a layer."""
    num_experts_per_tok: Annotated[int, AT_LEAST_1] = 1
    """Routed experts a token visits."""
    n_shared_experts: Annotated[int, AT_LEAST_0] = 0
    """Experts that every token visits, computed as one feed-forward of their joint width."""
    moe_residual: bool = False
    """A feed-forward of one expert's width beside the experts; each token weighs the two (arXiv 2201.05596)."""
    moe_intermediate_size: Annotated[int | None, AT_LEAST_1] = None
    """Width of one expert; None means the width of the dense feed-forward."""
    norm_topk_prob: bool = True
    """Divide the chosen experts' scores by their sum."""
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    """Router scores: softmax over the experts, or sigmoid of each."""
    routed_scaling_factor: Annotated[float, ABOVE_0] = 1.0
    """Multiplies the weights of the routed experts."""
    router_aux_loss_coef: Annotated[float, AT_LEAST_0] = 5e-4
    """Weight of the load-balancing loss; 0 is off."""
    seq_aux: bool = False
    """Balance the load within each sequence instead of over the batch."""
    aux_loss_scope: Literal["global", "micro"] | None = None
    """Tokens the load is balanced over: of the whole optimizer step, or of each micro-batch; None means global."""
    router_z_loss_coef: Annotated[float, AT_LEAST_0] = 0.0
    """Weight of the squared log-partition of the router logits; 0 is off."""
    router_bias_update_rate: Annotated[float, AT_LEAST_0] = 0.0
    """Step of the selection bias that balances the load without a loss (DeepSeek-V3); 0 is off."""
    first_k_dense_replace: Annotated[int, AT_LEAST_0] = 0
    """This many first layers keep the dense feed-forward."""

    def __post_init__(self) -> None:
        check_fields(type(self), asdict(self), "model config")
        _check_dense(self)
        _check_experts(self)

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def trained_length(self) -> int:
        """Tokens of the context that the model was trained at, as far as it is known."""
        return self.rope_original_max_position_embeddings or 2048

    @property
    def feed_forward_size(self) -> int:
        """Width of the dense feed-forward."""
        if self.intermediate_size is None:
            return default_intermediate_size(self.hidden_size)
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
        return self._count_params(active=False)

    def num_active_params(self) -> int:
        """Parameters that one token uses: all but the routed experts it does not visit."""
        return self._count_params(active=True)

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations of training (forward and backward) on one token in sequences of `seq_len` tokens.

        Matrix products only, 2*m*n*k each, three times for forward and the two products of backward; the output
        matrix included, the embedding look-up not; causal attention counted as the (seq_len + 1) / 2 keys that a
        token sees on average. Recomputation under activation checkpointing is no useful work and is not counted.
        """
        matrices = self._count_matrices(active=True) + self.vocab_size * self.hidden_size
        # Scores and weighted values are 2 * head_size operations each for every visible key.
        attention = self.num_hidden_layers * self.num_attention_heads * self.head_size * 2 * (seq_len + 1)
        return 3 * (2 * matrices + attention)

    @property
    def num_moe_layers(self) -> int:
        """Blocks that hold experts."""
        return self.num_hidden_layers - self.first_k_dense_replace if self.use_moe else 0

    def _count_params(self, *, active: bool) -> int:
        norms = 2 * self.hidden_size + (2 * self.head_size if self.qk_norm else 0)
        biases = 2 * self.num_moe_layers if self.moe_residual else 0
        if self.attention_bias:
            biases += (
                self.num_hidden_layers * self.head_size * (self.num_attention_heads + 2 * self.num_key_value_heads)
            )
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        blocks = self._count_matrices(active=active) + self.num_hidden_layers * norms + biases
        return blocks + self.hidden_size + embeddings

    def _count_matrices(self, *, active: bool) -> int:
        """Elements of the matrices of all blocks; `active`: without the routed experts that a token does not visit."""
        attention = 2 * self.hidden_size * self.head_size * (self.num_attention_heads + self.num_key_value_heads)
        dense = 3 * self.hidden_size * self.feed_forward_size
        expert = 3 * self.hidden_size * self.expert_feed_forward_size
        routed = self.num_experts_per_tok if active else self.num_experts
        moe = self.hidden_size * self.num_experts + (routed + self.n_shared_experts) * expert
        if self.moe_residual:
            moe += expert + 2 * self.hidden_size
        num_dense_layers = self.num_hidden_layers - self.num_moe_layers
        return self.num_hidden_layers * attention + num_dense_layers * dense + self.num_moe_layers * moe

    def to_dict(self) -> dict[str, Any]:
        """Every field and its value, fit for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """The config of these fields, defaults for the rest. Raises `UserError` on an unknown key or a wrong type."""
        return cls(**check_fields(cls, values, "model config"))


def default_intermediate_size(hidden_size: int) -> int:
    """MiniMind's feed-forward width: hidden_size * pi, rounded up to a multiple of 64."""
    return math.ceil(hidden_size * math.pi / 64) * 64


def _refuse(config: "ModelConfig", name: str, fix: str) -> NoReturn:
    raise UserError(f"model config: {name}: {getattr(config, name)!r} {fix}")


def _check_dense(config: "ModelConfig") -> None:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if not 0 <= getattr(config, name) < config.vocab_size:
            _refuse(config, name, f"must be a token id below vocab_size={config.vocab_size}")
    heads = config.num_attention_heads
    if config.head_dim is None and config.hidden_size % heads:
        _refuse(config, "hidden_size", f"does not divide by num_attention_heads={heads}; change one or set head_dim")
    if config.head_size % 2:
        name = "hidden_size" if config.head_dim is None else "head_dim"
        _refuse(config, name, f"gives heads of odd width {config.head_size}; rotary positions need an even one")
    if heads % config.num_key_value_heads:
        _refuse(config, "num_key_value_heads", f"does not divide num_attention_heads={heads}")
    if config.rope_beta_fast <= config.rope_beta_slow:
        _refuse(config, "rope_beta_fast", f"must be above rope_beta_slow={config.rope_beta_slow}")
    uses_yarn = config.rope_scaling_factor != 1 and config.rope_scaling_type == "yarn"
    if config.rope_attention_factor is not None and not uses_yarn:
        _refuse(config, "rope_attention_factor", "has no effect without YaRN; set rope_scaling_factor above 1")
    if config.rope_scaling_type != "yarn" and config.rope_scaling_factor == 1:
        _refuse(config, "rope_scaling_type", "has no effect; set rope_scaling_factor above 1")
    if config.num_params() > _MOST_PARAMS:
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "num_experts")
        largest = max(sizes, key=lambda name: getattr(config, name) or 0)
        _refuse(config, largest, f"gives a model of {float(config.num_params()):.1e} parameters; give its real size")


def _check_experts(config: "ModelConfig") -> None:
    if not config.use_moe:
        names = [field.name for field in fields(config)]
        for field in fields(config)[names.index("use_moe") + 1 :]:  # what only an MoE layer reads
            if getattr(config, field.name) != field.default:
                _refuse(config, field.name, f"has no effect on a dense model; set use_moe or leave it {field.default}")
        return
    if config.num_experts_per_tok > config.num_experts:
        _refuse(config, "num_experts_per_tok", f"is above num_experts={config.num_experts}")
    if config.first_k_dense_replace >= config.num_hidden_layers:
        layers = config.num_hidden_layers
        _refuse(config, "first_k_dense_replace", f"leaves no layer for experts; give less than {layers}")
