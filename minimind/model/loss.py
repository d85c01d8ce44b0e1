"""The output matrix and the next-token cross-entropy, fused so that the logits never exist as a whole.

Each chunk of tokens yields its logits, their float32 log-softmax and at once their gradient: nothing is recomputed,
and the peak is one chunk. This happens in the forward of the output matrix, where DeepSpeed ZeRO-3 has gathered its
weight. `labels[b, t]` is already the token that position t should predict.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.model.config import ModelConfig
from minimind.model.layers import Linear

IGNORE_INDEX = -100

LossOfChunk = Callable[[Tensor, slice], tuple[Tensor, Tensor | None]]
"""The losses (n, 1) of (n, vocab_size) logits, those of the tokens `rows` of the flat batch, or their sum, and its
gradient by the logits in their dtype, None where nothing is trained."""

OnLosses = Callable[[Tensor, slice], None]
"""Gets the losses (n, 1) of the tokens `rows`, 0 where none counts."""

CHUNK_LOGITS = 2**25
"""Logits of one chunk: 128 MiB in float32, large enough for a GPU to multiply at full speed."""


class LMHead(Linear):
    """The matrix from hidden states to token scores; with labels it returns the loss instead."""

    chunk_logits = CHUNK_LOGITS

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.hidden_size, config.vocab_size, config.initializer_range)
        self.z_loss_coef = config.z_loss_coef

    def forward(
        self,
        hidden_states: Tensor,
        labels: Tensor | None = None,
        reduction: str = "mean",
        weights: Tensor | None = None,
        loss_of_chunk: LossOfChunk | None = None,
        on_losses: OnLosses | None = None,
    ) -> Tensor:
        """Logits (..., vocab_size) of hidden states (..., hidden_size), or with labels (...) a float32 scalar.

        The loss is the cross-entropy over the labels that are not -100: their sum, or their mean (0 when there are
        none). In training mode it includes the z-loss, z_loss_coef * logsumexp(logits)**2 a token (arXiv 2204.02311),
        but not with weights: a negative one would turn it round.
        With reduction "none" it is that of each label, (...) float32, without a gradient and without the z-loss.

        Args:
            weights: (...) float32, of each label in the sum.
            loss_of_chunk: another loss in place of the cross-entropy.
            on_losses: gets what the sum is made of.
        """
        if labels is None:
            return super().forward(hidden_states)
        states = hidden_states.flatten(0, -2)
        dtype = _compute_dtype(states, self.weight)
        if reduction == "none":
            return _token_losses(states.to(dtype), self.weight.to(dtype), labels.flatten(), type(self)).view_as(labels)
        states, weight = states.to(dtype), self.weight.to(dtype)
        is_trained = torch.is_grad_enabled() and (states.requires_grad or weight.requires_grad)
        targets = labels.flatten()
        counts = targets != IGNORE_INDEX if weights is None else weights.flatten() * (targets != IGNORE_INDEX)
        z_loss_coef = self.z_loss_coef if self.training and weights is None else 0.0

        def cross_entropy(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
            return self.chunk_loss(logits, targets[rows], counts[rows], z_loss_coef, is_trained)

        loss = _TokenLoss.apply(states, weight, loss_of_chunk or cross_entropy, is_trained, type(self), on_losses)
        if reduction == "sum":
            return loss
        if reduction == "mean":
            return loss / (labels != IGNORE_INDEX).sum().clamp(min=1)
        raise ValueError(f"reduction={reduction!r} must be 'mean', 'sum' or 'none'")

    @staticmethod
    def matmul(left: Tensor, right: Tensor) -> Tensor:
        """(m, k) times (k, n): (m, n). No gradient is kept."""
        return left @ right

    @staticmethod
    def add_matmul(total: Tensor, left: Tensor, right: Tensor) -> None:
        """Add (m, k) times (k, n) to the float32 `total` (m, n) in place."""
        if left.dtype == total.dtype:
            total.addmm_(left, right)
        else:
            total += left @ right

    @staticmethod
    def chunk_loss(
        logits: Tensor, targets: Tensor, counts: Tensor, z_loss_coef: float, need_grad: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The losses (n, 1) of a chunk's (n, vocab_size) logits, and the gradient of their sum by them in their dtype.

        Args:
            counts: (n,) bool or float32, how much each label counts.
        """
        counted = counts.unsqueeze(1)  # (n, 1)
        indices = targets.unsqueeze(1).clamp(min=0)
        target_logits = logits.gather(1, indices).float()
        log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
        target_log_probs = log_probs.gather(1, indices)
        losses = -target_log_probs
        log_partition = target_logits - target_log_probs  # (n, 1)
        if z_loss_coef:
            losses = losses + z_loss_coef * log_partition.square()
        losses = losses * counted
        if not need_grad:
            return losses, None
        grad = log_probs.exp_()
        if z_loss_coef:
            grad *= 1 + 2 * z_loss_coef * log_partition
        grad.scatter_add_(1, indices, grad.new_full((1, 1), -1.0).expand_as(indices))
        return losses, grad.mul_(counted).to(logits.dtype)


@torch.no_grad()
def _compute_dtype(states: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of their product, autocast's where that is on: an empty product tells."""
    return F.linear(states[:0], weight[:0]).dtype


class _TokenLoss(torch.autograd.Function):
    """Sum of the token losses of (N, hidden_size) states, gradients taken on the way forward."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        loss_of_chunk: LossOfChunk,
        is_trained: bool,
        head: type[LMHead],
        on_losses: OnLosses | None,
    ) -> Tensor:
        need_states, need_weight = (is_trained and needed for needed in ctx.needs_input_grad[:2])
        chunk = max(1, head.chunk_logits // weight.shape[0])
        total = states.new_zeros((), dtype=torch.float32)
        states_grads = []
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for start in range(0, len(states), chunk):
            rows = slice(start, start + chunk)
            losses, logits_grad = loss_of_chunk(head.matmul(states[rows], weight.t()), rows)
            total = total + losses.sum()
            if on_losses is not None:
                on_losses(losses, rows)
            if logits_grad is not None and need_states:
                states_grads.append(head.matmul(logits_grad, weight))
            if logits_grad is not None and weight_grad is not None:
                head.add_matmul(weight_grad, logits_grad.t(), states[rows])
        ctx.save_for_backward(torch.cat(states_grads) if need_states else None, weight_grad)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        states_grad, weight_grad = ctx.saved_tensors
        # The scale (a loss scale, 1 / number of tokens) is applied last: the small probabilities of a mean over many
        # tokens would vanish in float16.
        return (
            None if states_grad is None else states_grad * scale.to(states_grad.dtype),
            None if weight_grad is None else (weight_grad * scale).to(ctx.weight_dtype),
            *[None] * 4,
        )


@torch.no_grad()
def _token_losses(states: Tensor, weight: Tensor, labels: Tensor, head: type[LMHead]) -> Tensor:
    """The cross-entropy of each of (N,) labels, float32; 0 without one."""
    chunk = max(1, head.chunk_logits // weight.shape[0])
    losses = [
        F.cross_entropy(head.matmul(rows, weight.t()).float(), targets, ignore_index=IGNORE_INDEX, reduction="none")
        for rows, targets in zip(states.split(chunk), labels.split(chunk), strict=True)
    ]
    return torch.cat(losses)
