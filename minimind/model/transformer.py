"""The model: pre-norm blocks, the stack of them, and the language model with its output matrix and loss.

Plain modules with Hugging Face's and MiniMind's parameter names. Refuses to know of optimizers, ranks, DeepSpeed and
files of training; it is wrapped, partitioned and checkpointed from outside.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import minimind
from minimind.errors import UserError
from minimind.model.attention import Attention
from minimind.model.attention_mask import AttentionMask, causal_mask, document_mask, segment_positions
from minimind.model.config import ModelConfig
from minimind.model.kv_cache import KVCache
from minimind.model.layers import Embedding, FeedForward, RMSNorm
from minimind.model.loss import LMHead, LossOfChunk, OnLosses
from minimind.model.moe import MoEFeedForward, ResidualFeedForward
from minimind.model.pretrained import write_pretrained
from minimind.model.rope import rotary_tables
from minimind.model.router import RouterRecord, step_bias


class CausalLMOutput(NamedTuple):
    """What one forward gives. A tuple, so that DeepSpeed's hooks find the tensors in it."""

    loss: Tensor | None = None
    """Float32 scalar, with labels only: cross-entropy and, in training, the z-loss."""
    logits: Tensor | None = None
    """(B, T or logits_to_keep, vocab_size), without labels only."""
    aux_loss: Tensor | None = None
    """Float32 scalar, with labels and experts only: the routers' losses of this batch, coefficients included."""
    expert_load: Tensor | None = None
    """(num_moe_layers, num_experts) int64, with labels and experts only: tokens sent to each expert."""
    dropped: Tensor | None = None
    """(num_moe_layers,) int64: those of them that found no room, where experts have a capacity."""
    expert_share: Tensor | None = None
    """(num_moe_layers, num_experts) float32, with labels and experts only: `RouterBalance.expert_share`."""
    expert_score: Tensor | None = None
    """(num_moe_layers, num_experts) float32, with labels and experts only: `RouterBalance.expert_score`."""


class Block(nn.Module):
    """Attention and feed-forward (or experts), each on a normalized copy of the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: nn.Module
        if config.has_experts(layer):
            self.mlp = MoEFeedForward(config)
        else:
            self.mlp = FeedForward(config, config.feed_forward_size)
        self.residual = ResidualFeedForward(config) if config.moe_residual and config.has_experts(layer) else None

    def forward(
        self,
        hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: AttentionMask,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, T, hidden_size) -> the same shape."""
        mixed = self.self_attn(self.input_layernorm(hidden_states), rotary, mask, cache)
        hidden_states = hidden_states + self._drop(mixed)
        normed = self.post_attention_layernorm(hidden_states)
        mixed = self.mlp(normed)
        if self.residual is not None:
            mixed = self.residual(normed, mixed)
        return hidden_states + self._drop(mixed)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.dropout and self.training else x


class MiniMindModel(nn.Module):
    """Embedding, blocks and final norm: token ids to hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        # Whether a block draws random numbers in training, which a recomputation must then repeat.
        self.draws_random = max(config.dropout, config.attention_dropout) > 0
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, config.initializer_range)
        self.layers = nn.ModuleList([Block(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, T) token ids -> (B, T, hidden_size); arguments as in `MiniMindForCausalLM.forward`."""
        num_read, num_new = cache.length if cache is not None else 0, input_ids.shape[1]
        limit = self.config.max_position_embeddings
        if (length := num_read + num_new) > limit:
            raise UserError(f"a sequence of {length} tokens is beyond the model's max_position_embeddings={limit}")
        if cache is not None:
            cache.reserve(num_new)
        hidden_states = self.embed_tokens(input_ids)
        if self.config.dropout and self.training:
            hidden_states = F.dropout(hidden_states, self.config.dropout)
        if position_ids is None:
            position_ids = _positions(input_ids, num_read, cu_seqlens, attention_mask)
        rotary = rotary_tables(self.config, position_ids)
        if cu_seqlens is not None:
            mask = self.document_mask(cu_seqlens, hidden_states)
        else:
            mask = causal_mask(num_new, num_read, attention_mask, input_ids.device)
        for layer in self.layers:
            if self.activation_checkpointing and self.training and cache is None:
                arguments = (hidden_states, rotary, mask)
                hidden_states = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=self.draws_random)
            else:
                hidden_states = layer(hidden_states, rotary, mask, cache)
        if cache is not None:
            cache.length += num_new
        return self.norm(hidden_states)

    def document_mask(self, cu_seqlens: Tensor, hidden_states: Tensor) -> AttentionMask:
        """The mask that keeps attention inside the documents of (B, T, hidden_size) `hidden_states`."""
        return document_mask(cu_seqlens, hidden_states.shape[:2])


def _positions(input_ids: Tensor, num_read: int, cu_seqlens: Tensor | None, attention_mask: Tensor | None) -> Tensor:
    """Position of each new token, (T,) or (B, T): counted from its document's start and without the padding."""
    num_new = input_ids.shape[1]
    if cu_seqlens is not None:
        return segment_positions(cu_seqlens, input_ids.numel()).view(input_ids.shape)
    if attention_mask is not None:
        return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -num_new:]
    return torch.arange(num_read, num_read + num_new, device=input_ids.device)


class MiniMindForCausalLM(nn.Module):
    """The language model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = MiniMindModel(config)
        self.lm_head = LMHead(config)
        self.tie_weights()
        self.router_record = RouterRecord()
        self.router_record.watch(
            [module.router for module in self.model.modules() if isinstance(module, MoEFeedForward)]
        )

    def tie_weights(self) -> None:
        """Make the output matrix the embedding itself, where the config ties them; again after a reload."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
        loss_reduction: str = "mean",
        weigh: Callable[[Tensor], Tensor] | None = None,
        loss_of_chunk: LossOfChunk | None = None,
        on_losses: OnLosses | None = None,
    ) -> CausalLMOutput:
        """Logits of (B, T) token ids, or with labels the loss.

        Args:
            labels: (B, T); `labels[b, t]` is already the token after `input_ids[b, t]`, -100 where none counts.
            position_ids: (T,) or (B, T); by default counted from the start of the row or document, without padding.
            cu_seqlens: int32 (num_segments + 1,), borders of documents over the B*T flat tokens, both ends and every
                end of a row among them: attention stays inside a document. Not with a cache or a mask.
            attention_mask: (B, S), 1 for a token and 0 for the padding on the left, S counting the tokens in the
                cache too. Leave it out where nothing is padded: the kernels are faster.
            cache: keys and values of the tokens read so far; `input_ids` are then the new ones only.
            logits_to_keep: logits of this many last positions only; 0 means all.
            loss_reduction: "mean" over the labels that count, their "sum", or "none": the loss of each, no gradient.
            weigh: gives each label's weight in the sum, (B, T), from the losses of the labels, (B, T) without gradient:
                any objective of their log-probabilities, its derivative taken beforehand.
            loss_of_chunk: a loss of the logits in place of the cross-entropy.
            on_losses: gets what a sum or mean is made of, chunk by chunk.

        Raises:
            UserError: the sequence is longer than `max_position_embeddings`, or than the cache.
        """
        if cu_seqlens is not None and (cache is not None or attention_mask is not None):
            raise ValueError("cu_seqlens cannot be combined with a cache or an attention_mask")
        inputs = (input_ids, position_ids, cu_seqlens, attention_mask, cache)
        if labels is None:
            return CausalLMOutput(logits=self.lm_head(self.model(*inputs)[:, -logits_to_keep:]))
        if not self.config.use_moe:
            return CausalLMOutput(
                loss=self._loss(self.model(*inputs), labels, loss_reduction, weigh, loss_of_chunk, on_losses)
            )
        self.router_record.start()
        hidden_states = self.model(*inputs)
        balance = self.router_record.finish(self.config, (input_ids.shape[0], input_ids.shape[1]))
        loss = self._loss(hidden_states, labels, loss_reduction, weigh, loss_of_chunk, on_losses)
        return CausalLMOutput(loss=loss, **balance._asdict())

    def _loss(
        self,
        hidden_states: Tensor,
        labels: Tensor,
        reduction: str,
        weigh: Callable[[Tensor], Tensor] | None,
        loss_of_chunk: LossOfChunk | None,
        on_losses: OnLosses | None,
    ) -> Tensor:
        weights = None if weigh is None else weigh(self.lm_head(hidden_states.detach(), labels, "none"))
        return self.lm_head(hidden_states, labels, reduction, weights, loss_of_chunk, on_losses)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute each block in the backward pass instead of keeping its activations (non-reentrant)."""
        self.model.activation_checkpointing = enabled

    def step_router_biases(self, expert_load: Tensor) -> None:
        """Move the selection biases, where the config has them, by one optimizer step's load.

        `expert_load` (num_moe_layers, num_experts): `CausalLMOutput.expert_load` summed over micro-batches and ranks.
        """
        for router, load in zip(self.router_record.routers, expert_load, strict=True):
            if router.bias is not None:
                step_bias(router.bias, load, self.config.router_bias_update_rate)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, each complete or not at all."""
        write_pretrained(folder, self.config, self.state_dict())

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> "MiniMindForCausalLM":
        """A trained model in evaluation mode, from anything that the commands' `--checkpoint` takes (`minimind.load`).

        Args:
            dtype: type to convert the weights to; None keeps the stored one.

        Raises:
            UserError: a file is missing, damaged, of another kind, or its weights do not fit the config.
        """
        # The formats import the model, so the model can reach them only through the package's lazy names.
        return minimind.load_weights(folder, device=device, dtype=dtype)
