"""Bytes of activations and of the loss that the backward pass keeps, by arithmetic over the model's shape.

It follows the modules of `minimind.model` line by line: it counts what autograd saves there, and tests compare the two.
Ranks that share a sequence (arXiv 2309.14509) hold a part of its tokens, and inside attention all tokens of a part of
its heads: the same bytes. Ranks that share the layers (arXiv 1909.08053) hold a part of what is inside attention and
feed-forward, and the whole residual stream.
"""

import math

import torch

from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import DTYPE_NAMES
from minimind.model.config import ModelConfig
from minimind.model.kernels import matmul
from minimind.model.kernels.attention import LONGEST_BY_MATMUL
from minimind.model.loss import CHUNK_LOGITS
from minimind.model.pretrained import TIED_NAME
from minimind.model.tuning import EMBEDDING


def precision_of(resolved: ResolvedRun) -> tuple[int, int]:
    """Bytes of an element in matrix products, and in the residual stream: they differ under autocast."""
    compute = 4 if resolved.train.precision == "fp32" else 2
    return compute, 4 if resolved.zero.autocast else compute


def tokens_of_rank(resolved: ResolvedRun) -> int:
    """Tokens of one micro-batch whose hidden states this rank has."""
    return resolved.train.micro_batch_size * resolved.data.seq_len // resolved.train.sp_size


def activation_bytes(resolved: ResolvedRun, device_type: str) -> int:
    """Bytes that one micro-batch keeps from the forward for the backward."""
    model, train = resolved.model, resolved.train
    compute, residual = precision_of(resolved)
    tokens = tokens_of_rank(resolved)
    # The final norm keeps its input (and on a CPU a number a token), the loss its gradient.
    ends = model.hidden_size * (compute + residual) + (4 if device_type == "cpu" else 0)
    total = tokens * ends
    # Cosines and sines of every position, in float32: of one row where all rows count alike.
    total += 8 * model.head_size * (tokens if resolved.data.document_mask else tokens // train.micro_batch_size)
    if train.activation_checkpointing:
        total += tokens * model.num_hidden_layers * model.hidden_size * residual
    else:
        layers = range(model.num_hidden_layers)
        total += sum(tokens * _block_bytes(resolved, device_type, model.has_experts(layer)) for layer in layers)
    if residual != compute:
        total += weight_casts(model, train.tp_size)
    # Of each adapted matrix, the few numbers between its adapters.
    return total + tokens * compute * sum(
        shape[-2] * (1 if len(shape) == 2 else model.num_experts_per_tok)
        for name, shape in resolved.trained.items()
        if name.endswith("lora_A")
    )


def trains_output_matrix(resolved: ResolvedRun) -> bool:
    """Whether the output matrix, which is the embedding where they are tied, gets a gradient."""
    return (EMBEDDING if resolved.model.tie_word_embeddings else TIED_NAME) in resolved.trained


def scores_on_gpu(resolved: ResolvedRun, device_type: str) -> bool:
    """Whether a GPU keeps a matrix of scores: torch has no fused kernel for float32 queries in groups."""
    model = resolved.model
    grouped = model.num_key_value_heads < model.num_attention_heads
    return device_type != "cpu" and resolved.train.precision == "fp32" and grouped


def weight_casts(config: ModelConfig, tp_size: int) -> int:
    """Bytes of the 16-bit copies of all matrices that autocast makes in a forward and keeps for the backward."""
    return 2 * (params_of_rank(config, tp_size) - config.vocab_size * config.hidden_size)


def params_of_rank(config: ModelConfig, tp_size: int) -> int:
    """Parameters that a rank computes with, experts of others included: its part of the matrices of attention, of dense
    feed-forwards and shared experts, and all of what tensor parallelism leaves whole (embedding, norms, experts)."""
    query, key = _attention_widths(config)
    dense = config.num_hidden_layers - config.num_moe_layers
    shared = config.num_hidden_layers * 2 * config.hidden_size * (query + key)
    shared += dense * 3 * config.hidden_size * config.feed_forward_size
    width = config.n_shared_experts * config.expert_feed_forward_size if config.use_moe else 0
    shared += config.num_moe_layers * 3 * config.hidden_size * width
    return config.num_params() - shared + shared // tp_size


def loss_peak(resolved: ResolvedRun, device_type: str) -> int:
    """Bytes of the loss at its highest: a chunk's logits and float32 log-probabilities, the gradient that the chunk
    before left, and the float32 gradient of the output matrix."""
    model, compute = resolved.model, precision_of(resolved)[0]
    tokens = tokens_of_rank(resolved)
    chunk_logits = matmul.CPU_CHUNK_LOGITS if device_type == "cpu" else CHUNK_LOGITS
    rows = max(1, chunk_logits // model.vocab_size)
    first = min(tokens, rows)
    second = min(tokens - first, rows)
    chunk = max(8 * first, compute * first + 8 * second) * model.vocab_size
    matrix = model.vocab_size * model.hidden_size * trains_output_matrix(resolved)
    return chunk + 4 * matrix + (compute * matrix if compute != 4 else 0)


def output_matrix_gradient(resolved: ResolvedRun) -> int:
    """Bytes of the embedding's own gradient, which meets that of the output matrix at the end of the backward."""
    model = resolved.model
    return model.vocab_size * model.hidden_size * precision_of(resolved)[1] * trains_output_matrix(resolved)


def backward_peak(resolved: ResolvedRun, device_type: str) -> int:
    """Bytes on top of the activations when the backward begins: the scaled gradient of the output matrix, and one
    block's gradients (under checkpointing also its recomputed activations)."""
    model, train = resolved.model, resolved.train
    compute, residual = precision_of(resolved)
    tokens = tokens_of_rank(resolved)
    last = model.has_experts(model.num_hidden_layers - 1)
    width = 3 * _feed_forward_width(model, last, train.tp_size) * compute + 2 * model.hidden_size * residual
    matrix = model.vocab_size * model.hidden_size * (8 if compute == 4 else 6) * trains_output_matrix(resolved)
    recomputed = _block_bytes(resolved, device_type, last) if train.activation_checkpointing else 0
    return matrix + tokens * (width + recomputed)


def _block_bytes(resolved: ResolvedRun, device_type: str, has_experts: bool) -> int:
    """Bytes that the backward of one block keeps for a token."""
    model, train = resolved.model, resolved.train
    compute, residual = precision_of(resolved)
    hidden = model.hidden_size
    heads, key_heads = model.num_attention_heads // train.tp_size, model.num_key_value_heads // train.tp_size
    query, key = heads * model.head_size, key_heads * model.head_size
    # Autocast casts a norm's output once for each matrix that reads it.
    copies = 2 if compute == residual else (5 if not has_experts else 4)
    total = copies * hidden * compute
    total += 2 * hidden * residual + ((query + key) * compute if model.qk_norm else 0)
    if device_type == "cpu":  # a number for every row that is normed
        total += 8 + 4 * model.qk_norm * (heads + key_heads)
    # A processor without 16-bit products computes attention in float32, and rounds the outcome.
    is_16_bit_on_cpu = device_type == "cpu" and compute == 2
    is_upcast = is_16_bit_on_cpu and not matmul.has_fast_matmul(getattr(torch, DTYPE_NAMES[train.precision]))
    inside = 4 if is_upcast else compute
    total += 2 * (query + key) * inside + is_upcast * query * compute + 4 * heads
    if train.sp_size > 1:
        # Fewer key heads than ranks are repeated; the outcome comes back from the other ranks as a second tensor.
        repeats = train.sp_size // math.gcd(key_heads, train.sp_size)
        total += 2 * key * (repeats - 1) * inside + query * compute
    seq_len = resolved.data.seq_len
    by_matmul = is_16_bit_on_cpu and not is_upcast and seq_len <= LONGEST_BY_MATMUL
    if model.flash_attn and by_matmul:
        total += heads * seq_len * compute
    if model.flash_attn and scores_on_gpu(resolved, device_type):
        total += heads * seq_len * compute + 2 * (query - key) * compute
    if not model.flash_attn:
        total += heads * seq_len * (4 + 2 * inside)
    # Gate, up, their product and silu(gate), which a CPU recomputes; its routed experts keep gate and up alone.
    total += (3 if device_type == "cpu" else 4) * _feed_forward_width(model, has_experts, train.tp_size) * compute
    if has_experts and device_type == "cpu":
        total -= model.num_experts_per_tok * model.expert_feed_forward_size * compute
    if has_experts:
        # Tokens as dispatched and combined, and what the router keeps: logits, scores, choices.
        total += 2 * model.num_experts_per_tok * (hidden * compute + 20) + 12 * model.num_experts
        # What residual experts mix: both outputs, and a token's two weights.
        total += model.moe_residual * (2 * hidden * compute + 16)
    if model.dropout:
        total += 2 * hidden
    return total


def _attention_widths(config: ModelConfig) -> tuple[int, int]:
    return config.num_attention_heads * config.head_size, config.num_key_value_heads * config.head_size


def _feed_forward_width(config: ModelConfig, has_experts: bool, tp_size: int) -> int:
    if not has_experts:
        return config.feed_forward_size // tp_size
    visited = config.num_experts_per_tok + config.moe_residual
    size = config.expert_feed_forward_size
    return size * visited + size * config.n_shared_experts // tp_size
