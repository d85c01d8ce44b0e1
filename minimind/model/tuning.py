"""Which weights a run trains, by their names and shapes: all, those that a pattern leaves, or LoRA's adapters alone.

Arithmetic over the config, without torch; that the names are those of the real modules is held by the tests.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from minimind.model.config import ModelConfig

LoRATarget = Literal["q", "k", "v", "o", "gate", "up", "down", "experts"]
LORA_TARGETS: tuple[LoRATarget, ...] = ("q", "k", "v", "o", "gate", "up", "down")
_MATRIX = re.compile(r"\.(q|k|v|o|gate|up|down)_proj\.weight$")
_EXPERTS = re.compile(r"\.experts\.(gate_up|down)_proj$")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")

EMBEDDING = "model.embed_tokens.weight"
"""Also of the output matrix, where the two are tied."""
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation (arXiv 2106.09685): beside a frozen matrix W a trained product, W x + scale * B (A x)."""

    rank: int
    alpha: float
    targets: tuple[LoRATarget, ...] = LORA_TARGETS
    """Matrices of attention, and of dense, shared and residual feed-forwards; experts: of each routed one, gate and up
    as one matrix."""

    @property
    def scale(self) -> float:
        """What the product is multiplied by, so that the rank may change and the learning rate stay."""
        return self.alpha / self.rank

    def has(self, weight: str) -> bool:
        """Whether the matrix of this name gets adapters."""
        if _EXPERTS.search(weight):
            return "experts" in self.targets
        match = _MATRIX.search(weight)
        return match is not None and match[1] in self.targets


def adapters_of(weight: str) -> tuple[str, str]:
    """Names of the adapters A (rank, in) and B (out, rank) of a matrix; of stacked experts, (E, rank, in) and so on."""
    start = weight.removesuffix("weight").removesuffix("proj")
    return f"{start}lora_A", f"{start}lora_B"


def parameter_shapes(config: ModelConfig) -> Shapes:
    """Name and shape of every parameter of the model; a tied matrix once."""
    shapes: Shapes = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + name: shape for name, shape in _block_shapes(config, config.has_experts(layer))}
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def _block_shapes(config: ModelConfig, has_experts: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, head = config.hidden_size, config.head_size
    yield from ((f"{name}_layernorm.weight", (hidden,)) for name in ("input", "post_attention"))
    query, key = config.num_attention_heads * head, config.num_key_value_heads * head
    for name, size in (("q", query), ("k", key), ("v", key)):
        yield f"self_attn.{name}_proj.weight", (size, hidden)
        if config.attention_bias:
            yield f"self_attn.{name}_proj.bias", (size,)
    yield "self_attn.o_proj.weight", (hidden, query)
    if config.qk_norm:
        yield from ((f"self_attn.{name}_norm.weight", (head,)) for name in "qk")
    if not has_experts:
        yield from _feed_forward_shapes("mlp.", hidden, config.feed_forward_size)
        return
    count, size = config.num_experts, config.expert_feed_forward_size
    yield "mlp.gate.weight", (count, hidden)
    yield "mlp.experts.gate_up_proj", (count, 2 * size, hidden)
    yield "mlp.experts.down_proj", (count, hidden, size)
    if config.n_shared_experts:
        yield from _feed_forward_shapes("mlp.shared_experts.", hidden, config.n_shared_experts * size)
    if config.moe_residual:
        yield from _feed_forward_shapes("residual.mlp.", hidden, size)
        yield from (("residual.coefficient.weight", (2, hidden)), ("residual.coefficient.bias", (2,)))


def _feed_forward_shapes(prefix: str, hidden: int, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from ((f"{prefix}{name}_proj.weight", (size, hidden)) for name in ("gate", "up"))
    yield f"{prefix}down_proj.weight", (hidden, size)


def trained_shapes(config: ModelConfig, lora: LoRA | None = None, freeze: str = "") -> Shapes:
    """Name and shape of every parameter that is trained.

    Args:
        lora: the adapters, and nothing else.
        freeze: a regular expression; parameters in whose name it is found are not trained. Empty: all are.
    """
    shapes = parameter_shapes(config)
    if lora is None:
        return {name: shape for name, shape in shapes.items() if not freeze or not re.search(freeze, name)}
    adapters: Shapes = {}
    for name, shape in shapes.items():
        if lora.has(name):
            first, second = adapters_of(name)
            adapters |= {first: (*shape[:-2], lora.rank, shape[-1]), second: (*shape[:-1], lora.rank)}
    return adapters


def count(shapes: Mapping[str, Sequence[int]]) -> int:
    """Elements of all of them."""
    return sum(map(math.prod, shapes.values()))


def training_flops_per_token(config: ModelConfig, seq_len: int, trained: Shapes) -> int:
    """Floating-point operations of training on one token: `ModelConfig.flops_per_token` where only some is trained.

    Counted as there: of every matrix the forward (2 a weight); the gradient of its input (2) from the block with the
    first trained weight on; its own gradient (2) only where it is trained itself. Adapters come on top, with all three.
    """
    first = min((_depth(config, name) for name in trained), default=config.num_hidden_layers)
    base = parameter_shapes(config)
    total = sum(6 * _active(config, name, shape) for name, shape in trained.items() if name not in base)
    head = EMBEDDING if config.tie_word_embeddings else "lm_head.weight"
    for name, shape in base.items():
        if len(shape) < 2 or (name == EMBEDDING and name != head):  # a look-up
            continue
        depth = config.num_hidden_layers if name == head else _depth(config, name)
        total += 2 * _active(config, name, shape) * (1 + (depth >= first) + (name in trained))
    scores = config.num_attention_heads * config.head_size * 2 * (seq_len + 1)
    return total + scores * sum(3 if layer >= first else 1 for layer in range(config.num_hidden_layers))


def _active(config: ModelConfig, name: str, shape: tuple[int, ...]) -> int:
    """Elements of a matrix that one token meets: of the routed experts, those of its own."""
    routed = ".mlp.experts." in name
    return math.prod(shape) * config.num_experts_per_tok // config.num_experts if routed else math.prod(shape)


def _depth(config: ModelConfig, name: str) -> int:
    """The number of the block that a parameter is in; the embedding is before the first, the rest after the last."""
    match = _LAYER.match(name)
    if match is not None:
        return int(match[1])
    return -1 if name == EMBEDDING else config.num_hidden_layers
