"""The loss of a model on token shards or plain text: per token, per byte, and as perplexity."""

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch.distributed import ProcessGroup

from minimind.accelerator import has_streams, widest_float
from minimind.data.dataset import WHOLE, Dataset, SequencePart
from minimind.data.loader import Batch, DeviceCopy, eval_batches
from minimind.data.manifest import MANIFEST_NAME, Manifest
from minimind.data.mixture import Mixture
from minimind.data.shard_writer import ShardWriter
from minimind.data.shards import ShardReader, open_split
from minimind.data.tokenizer import load_tokenizer
from minimind.distributed.collectives import all_reduce_sum
from minimind.errors import UserError
from minimind.files import disk_errors
from minimind.model import MiniMindForCausalLM
from minimind.model.transformer import CausalLMOutput


@dataclass(frozen=True)
class Evaluation:
    """The figures of one evaluation. `bits_per_byte` does not depend on the tokenizer, so it compares any models."""

    loss: float
    """Mean negative log-likelihood of a token, in nats."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float | None
    """The loss in bits, times the tokens per byte of UTF-8 text (end tokens included); None for conversations, of which
    not every byte is predicted."""
    num_targets: int
    """Tokens predicted."""
    num_samples: int
    """Windows read."""
    figures: dict[str, float] = field(default_factory=dict)
    """Other means over the targets."""
    sources: dict[str, "Evaluation"] = field(default_factory=dict)
    """Of a mixture: those of each source. The means above are then weighted by the shares with which training began,
    counts are sums."""


@dataclass(frozen=True)
class Sums:
    """What an evaluation adds up over batches."""

    loss: torch.Tensor  # () float32
    count: int  # what the loss and the figures are a mean over
    figures: dict[str, torch.Tensor] = field(default_factory=dict)  # each () float32


def sum_loss(model: Any, batch: Batch, **options: Any) -> CausalLMOutput:
    """Forward of a model or an engine, with the loss summed over the targets of `batch`, which is on its device.

    Args:
        options: others of the forward, such as `weigh`, or another `loss_reduction`.
    """
    return model(
        batch.input_ids,
        batch.labels,
        position_ids=batch.position_ids,
        cu_seqlens=batch.cu_seqlens,
        **{"loss_reduction": "sum", **options},
    )


def token_sums(model: Any, batch: Batch) -> Sums:
    """The cross-entropy of the targets."""
    loss = sum_loss(model, batch).loss
    assert loss is not None
    return Sums(loss, batch.num_targets)


def pair_sums(model: Any, batch: Batch) -> Sums:
    """Of pairs: the cross-entropy a token of the preferred answer, and how often it is the more probable one."""
    log_probs, lengths = answer_log_probs(model, batch)
    means = (log_probs / lengths.clamp(min=1)).view(-1, 2)
    right = (log_probs.view(-1, 2)[:, 0] > log_probs.view(-1, 2)[:, 1]).sum().float()
    figures = {"accuracy": right, "accuracy_per_token": (means[:, 0] > means[:, 1]).sum().float()}
    return Sums(-means[:, 0].sum(), len(batch.pairs), figures)


def answer_log_probs(
    model: Any, batch: Batch, sequence: ProcessGroup | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and number of tokens of each answer of a batch of pairs, (2 * num_pairs,) float32.

    Args:
        sequence: ranks that have the other parts of these rows; each of them calls this.
    """
    losses = sum_loss(model, batch, loss_reduction="none").loss
    assert losses is not None
    return sum_answers(losses, batch, sequence)


def sum_answers(
    losses: torch.Tensor, batch: Batch, sequence: ProcessGroup | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `answer_log_probs`, from the (B, T) cross-entropy of each label."""
    assert batch.answers is not None
    places = batch.answers.flatten() + 1  # the first place is of labels of no answer
    sums = losses.new_zeros(2 * len(batch.pairs) + 1)
    lengths = torch.zeros_like(sums).index_add_(0, places, torch.ones_like(losses.flatten()))
    sums.index_add_(0, places, -losses.flatten())
    if sequence is not None:
        for parts in (sums, lengths):
            torch.distributed.all_reduce(parts, group=sequence)
    return sums[1:], lengths[1:]


@torch.no_grad()
def measure_loss(
    model: Any,
    dataset: Dataset,
    device: torch.device,
    *,
    micro_batch_size: int = 8,
    max_samples: int | None = None,
    dp_rank: int = 0,
    dp_size: int = 1,
    part: SequencePart = WHOLE,
    group: torch.distributed.ProcessGroup | None = None,
    before_batch: Callable[[], object] = lambda: None,
    sums: Callable[[Any, Batch], Sums] = token_sums,
) -> Evaluation:
    """The loss over the windows of `dataset`, whatever it is; the same on any number of ranks. Every rank calls this.

    Args:
        model: a model, or a DeepSpeed engine.
        dp_rank, dp_size: this rank among those that share the windows.
        part: of each window, where ranks share it.
        group: ranks that have all windows together; None: all ranks.
        sums: what is measured of a batch on its device.
    """

    def measure(windows: range, manifest: Manifest) -> Evaluation:
        batches = eval_batches(
            dataset, micro_batch_size, dp_rank, dp_size, part, max_samples=max_samples or None, windows=windows
        )
        num_samples = min(max_samples or len(windows), len(windows))
        return _measure(model, batches, num_samples, manifest, device, dp_size * part.count, group, before_batch, sums)

    if not isinstance(dataset, Mixture):
        return measure(range(len(dataset)), dataset.reader.manifest)
    found, first = {}, 0
    for source in dataset.sources:
        found[source.name] = measure(range(first, first + source.num_windows), source.windows.reader.manifest)
        first += source.num_windows
    return _weigh_sources(dataset, found)


def _measure(
    model: Any,
    batches: Iterator[Batch],
    num_samples: int,
    manifest: Manifest,
    device: torch.device,
    num_ranks: int,
    group: torch.distributed.ProcessGroup | None,
    before_batch: Callable[[], object],
    sums: Callable[[Any, Batch], Sums],
) -> Evaluation:
    was_training = model.training
    model.eval()
    total, num_targets = torch.zeros(1, dtype=widest_float(device), device=device), 0
    names: list[str] = []
    copy = DeviceCopy(device)
    try:
        for batch in batches:
            before_batch()
            if has_streams(device):
                batch = batch.pin_memory()
            found = sums(model, copy(batch))
            names = list(found.figures)
            total = total + torch.stack([found.loss, *found.figures.values()]).to(total.dtype)
            num_targets += found.count
    finally:
        model.train(was_training)
    totals = torch.tensor([num_targets, *total.tolist()], dtype=torch.float64)
    num_targets, *means = (all_reduce_sum(totals, group) if num_ranks > 1 else totals).tolist()
    loss, *figures = (value / num_targets if num_targets else math.nan for value in means)
    bytes_per_token = 0.0 if manifest.is_chat else manifest.bytes_per_token
    bits_per_byte = loss / math.log(2) / bytes_per_token if bytes_per_token else None
    perplexity = math.exp(min(loss, 700.0))
    named = dict(zip(names, figures, strict=True))
    return Evaluation(loss, perplexity, bits_per_byte, int(num_targets), num_samples, named)


def _weigh_sources(mixture: Mixture, found: dict[str, Evaluation]) -> Evaluation:
    """The figures of a mixture: what a token of it, drawn by the shares with which training began, costs on average."""
    weights = {source.name: float(source.weight) for source in mixture.sources}
    if not any(weights.values()):  # what is read from the beginning has nothing to evaluate
        weights = dict.fromkeys(weights, 1.0)

    def mean(values: dict[str, float]) -> float:
        return sum(weights[name] * values[name] for name in values if weights[name]) / sum(weights.values())

    loss = mean({name: one.loss for name, one in found.items()})
    bits_per_byte = None
    if all(one.bits_per_byte is not None for one in found.values()):
        sizes = {source.name: source.windows.reader.manifest.bytes_per_token for source in mixture.sources}
        bits_per_byte = loss / math.log(2) / mean(sizes)
    names = next(iter(found.values())).figures
    return Evaluation(
        loss,
        math.exp(min(loss, 700.0)),
        bits_per_byte,
        sum(one.num_targets for one in found.values()),
        sum(one.num_samples for one in found.values()),
        {name: mean({source: one.figures[name] for source, one in found.items()}) for name in names},
        found,
    )


@contextlib.contextmanager
def shards_of_texts(files: Sequence[Path], tokenizer_file: Path) -> Iterator[ShardReader]:
    """Text files as shards in a temporary folder, each file one document.

    Raises:
        UserError: a file cannot be read, is not UTF-8, or is empty.
    """
    tokenizer = load_tokenizer(tokenizer_file)
    with tempfile.TemporaryDirectory(prefix="minimind-text-") as folder:
        with (
            disk_errors(folder),
            ShardWriter(
                Path(folder, "text"),
                vocab_size=tokenizer.vocab_size,
                eos_token_id=tokenizer.eos_token_id,
                tokenizer_file=tokenizer_file,
            ) as writer,
        ):
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
    """A split of a corpus, or `folder` itself if it holds shards."""
    return ShardReader(folder) if (folder / MANIFEST_NAME).exists() else open_split(folder, split)


def check_vocabulary(model: MiniMindForCausalLM, reader: ShardReader) -> None:
    """Refuse data with token ids that the model lacks.

    Raises:
        UserError: naming both sizes.
    """
    there, here = reader.manifest.vocab_size, model.config.vocab_size
    if there > here:
        raise UserError(f"the data has a vocabulary of {there} tokens and the model one of {here}: another tokenizer")
