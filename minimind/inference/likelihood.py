"""Log-likelihood of a continuation after a context."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from minimind.data.tokenizer import Tokenizer
from minimind.model import MiniMindForCausalLM


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and its continuation, encoded together; spaces between the two belong to the second."""
    blanks = len(context) - len(context.rstrip())
    if blanks:
        context, continuation = context[:-blanks], context[-blanks:] + continuation
    before = tokenizer.encode(context) or [tokenizer.eos_token_id]
    whole = tokenizer.encode(context + continuation) if context else before + tokenizer.encode(continuation)
    return whole[: len(before)], whole[len(before) :]


@torch.no_grad()
def log_likelihood(model: MiniMindForCausalLM, context: Sequence[int], continuation: Sequence[int]) -> float:
    """Log-probability, in nats, of a continuation after a context, cut at the front to what the model can read."""
    limit = model.config.max_position_embeddings
    ids = [*context, *continuation][-(limit + 1) :]
    device = model.lm_head.weight.device
    kept = min(len(continuation), len(ids) - 1)
    logits = model(torch.tensor([ids[:-1]], device=device), logits_to_keep=kept).logits[0]
    targets = torch.tensor(ids[-kept:], device=device)
    return -float(F.cross_entropy(logits.float(), targets, reduction="sum"))
