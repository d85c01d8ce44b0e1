"""The loss of a model on token shards or plain text: per token, per byte, and as perplexity."""

import contextlib
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minimind.data.dataset import TokenDataset
from minimind.data.loader import eval_batches
from minimind.data.manifest import MANIFEST_NAME
from minimind.data.shards import ShardReader, ShardWriter, open_split
from minimind.data.tokenizer import load_tokenizer
from minimind.distributed.collectives import all_reduce_sum
from minimind.errors import UserError
from minimind.model import MiniMindForCausalLM


@dataclass(frozen=True)
class Evaluation:
    """What was measured. `bits_per_byte` does not depend on the tokenizer, so it compares models of all kinds."""

    loss: float
    """Mean negative log-likelihood of a token, in nats."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float
    """The loss in bits, times the tokens that one byte of UTF-8 text takes (end tokens included)."""
    num_targets: int
    """Tokens predicted."""
    num_samples: int
    """Windows read."""


@torch.no_grad()
def evaluate(
    model: MiniMindForCausalLM,
    dataset: TokenDataset,
    *,
    micro_batch_size: int = 8,
    max_samples: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Evaluation:
    """Measure `model` on the windows of `dataset`; with several ranks, every one calls this and gets the same answer.

    Raises `UserError` when the loss is NaN or infinite, or no token counts.
    """
    device = model.lm_head.weight.device
    was_training = model.training
    model.eval()
    num_samples = min(max_samples or len(dataset), len(dataset))
    totals = torch.zeros(2, dtype=torch.float64)  # sum of the losses, number of targets
    batches = eval_batches(dataset, micro_batch_size, rank, world_size, max_samples=num_samples)
    num_batches = -(-num_samples // (micro_batch_size * world_size))
    quiet = rank != 0 or not sys.stderr.isatty()
    try:
        for batch in tqdm(batches, total=num_batches, desc="evaluating", unit="batch", disable=quiet):
            moved = batch.to(device)
            output = model(
                moved.input_ids,
                moved.labels,
                position_ids=moved.position_ids,
                cu_seqlens=moved.cu_seqlens,
                loss_reduction="sum",
            )
            totals += torch.tensor([float(output.loss), batch.num_targets], dtype=torch.float64)
    finally:
        model.train(was_training)
    if world_size > 1:
        totals = all_reduce_sum(totals)
    loss_sum, num_targets = totals.tolist()
    if num_targets == 0 or not math.isfinite(loss_sum):
        raise UserError(
            f"the loss over {num_targets:.0f} tokens is {loss_sum}: the model's weights or the data are bad"
        )
    loss = loss_sum / num_targets
    bytes_per_token = dataset.reader.manifest.bytes_per_token
    bits_per_byte = loss / math.log(2) / bytes_per_token if bytes_per_token else math.nan
    return Evaluation(loss, math.exp(min(loss, 700.0)), bits_per_byte, int(num_targets), num_samples)


@contextlib.contextmanager
def shards_of_texts(files: Sequence[Path], tokenizer_file: Path) -> Iterator[ShardReader]:
    """Text files as shards, each file one document; they lie in a temporary folder until the context is left.

    Raises `UserError` for a file that cannot be read, is not UTF-8, or is empty.
    """
    tokenizer = load_tokenizer(tokenizer_file)
    with tempfile.TemporaryDirectory(prefix="minimind-text-") as folder:
        with ShardWriter(
            Path(folder, "text"),
            vocab_size=tokenizer.vocab_size,
            eos_token_id=tokenizer.eos_token_id,
            tokenizer_file=tokenizer_file,
        ) as writer:
            for file in files:
                text = _read_text(file)
                writer.add_document(np.array(tokenizer.encode(text, allow_special=False)), len(text.encode()))
        yield ShardReader(Path(folder, "text"))


def _read_text(file: Path) -> str:
    try:
        text = file.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from None
    if not text:
        raise UserError(f"{file} is empty: there is nothing to predict")
    return text


def open_shards(folder: Path, split: str) -> ShardReader:
    """The split of a corpus, or the shard folder given itself, whatever its name."""
    return ShardReader(folder) if (folder / MANIFEST_NAME).exists() else open_split(folder, split)


def check_vocabulary(model: MiniMindForCausalLM, reader: ShardReader) -> None:
    """Raise `UserError` when the data has token ids that the model lacks."""
    there, here = reader.manifest.vocab_size, model.config.vocab_size
    if there > here:
        raise UserError(f"the data has a vocabulary of {there} tokens and the model one of {here}: another tokenizer")
