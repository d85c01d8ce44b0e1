"""The batches of one rank at each step, as tensors.

Training: step s takes the samples [s*G, (s + 1)*G) of the global order whatever the number of ranks, so nothing but
the step has to be remembered to continue. Evaluation: every window once, in order.
"""

import concurrent.futures
import dataclasses
import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from minimind.accelerator import device_module, has_streams
from minimind.data.dataset import IGNORED_LABEL, WHOLE, Dataset, Sample, SequencePart
from minimind.data.mixture import Mixture
from minimind.data.mixture_order import MixtureOrder
from minimind.data.shuffle import ShuffledOrder
from minimind.errors import UserError


@dataclasses.dataclass(frozen=True)
class Batch:
    """One forward of one rank: B windows of T tokens, or parts of T tokens of as many windows."""

    input_ids: torch.Tensor  # (B, T) int64
    labels: torch.Tensor  # (B, T) int64, already shifted; IGNORED_LABEL where there is no target
    position_ids: torch.Tensor | None  # (B, T) int64, restarting at each document; None without a document mask
    cu_seqlens: torch.Tensor | None  # (num_segments + 1,) int32 boundaries over the whole windows; None without a mask
    positions: tuple[int, ...]  # place of each window in the global order (or of the evaluated windows); -1: filling
    num_targets: int  # labels that count
    soft_ids: torch.Tensor | None = None  # (B, T, k) int64, see `minimind.data.soft_labels`
    soft_log_probs: torch.Tensor | None = None  # (B, T, k) float32
    sources: torch.Tensor | None = None  # (B,) int64 of a mixture: the source of each window
    num_sources: int = 0  # of that mixture
    # Preferences only:
    answers: torch.Tensor | None = None  # (B, T) int64: which of the batch's answers a label is of, -1: none
    pairs: tuple[int, ...] = ()  # document of each pair; pair i has the answers 2i and 2i + 1 (rejected)
    liked: torch.Tensor | None = None  # (num_pairs,) bool, see `Sample`
    reference: torch.Tensor | None = None  # (2 * num_pairs,) float32 log-probability of each answer before training

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch on `device`; `non_blocking` overlaps the copy with the device's work from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory (needs an accelerator)."""
        return self._map(torch.Tensor.pin_memory)

    def in_parts(self, count: int) -> "Batch":
        """Each window as `count` shorter ones, which do not see each other: (B * count, T / count). Not with a document
        mask, soft labels or answers."""
        if count == 1:
            return self
        input_ids, labels = (tokens.unflatten(1, (count, -1)).flatten(0, 1) for tokens in (self.input_ids, self.labels))
        sources = None if self.sources is None else self.sources.repeat_interleave(count)
        return dataclasses.replace(self, input_ids=input_ids, labels=labels, sources=sources)

    def _map(self, function: Any) -> "Batch":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **{name: function(value) for name, value in tensors.items()})


class DeviceCopy:
    """Copies batches to a device; pinned ones to CUDA on a stream of its own, beside what the device computes, so that
    a batch is there before its turn comes. Nothing waits on the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = device_module(device).Stream(device) if has_streams(device) else None

    def __call__(self, batch: Batch) -> Batch:
        """`batch` on the device, for use on the current stream."""
        if self._stream is None:
            return batch.to(self.device)
        module = device_module(self.device)
        current = module.current_stream(self.device)
        with module.stream(self._stream):
            moved = batch.to(self.device, non_blocking=True)
        current.wait_stream(self._stream)
        for value in vars(moved).values():
            if isinstance(value, torch.Tensor):
                value.record_stream(current)  # its memory is not given to a later batch before the current one is done
        return moved


class BatchLoader:
    """The training batches of one rank: `step_batches` is a pure function of its step and these arguments.

    Args:
        first_step: the step that takes the first samples of the order: later than 0 for shards that came in later.
        taken: windows of each source, by fingerprint, that were taken before.
        window_warmup_steps: steps in which windows come in parts.

    Raises `UserError` when `global_batch_size` is not a whole number of micro-batches on every rank.
    """

    def __init__(
        self,
        dataset: Dataset,
        seed: int,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        part: SequencePart = WHOLE,
        *,
        first_step: int = 0,
        taken: Mapping[str, int] | None = None,
        window_warmup_steps: int = 0,
        pin_memory: bool = False,
    ) -> None:
        together = micro_batch_size * dp_size
        if min(micro_batch_size, global_batch_size, dp_size) < 1 or global_batch_size % together:
            raise UserError(
                f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} "
                f"x {dp_size} ranks = {together}"
            )
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"data-parallel rank {dp_rank} of {dp_size}")
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.gradient_accumulation_steps = global_batch_size // together
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.part = part
        self.first_step = first_step
        self.order = order_windows(dataset, seed, global_batch_size, first_step, taken or {})
        self._window_warmup_steps = window_warmup_steps
        self._pin_memory = pin_memory

    def step_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of optimizer step `step` (from 0): micro-batch j has the positions
        (step - first_step)*G + (j*dp_size + dp_rank)*micro_batch_size onwards in the global order."""
        micro, together = self.micro_batch_size, self.micro_batch_size * self.dp_size
        start = (step - self.first_step) * self.global_batch_size + self.dp_rank * micro
        # (gradient_accumulation_steps, micro_batch_size)
        positions = start + np.arange(self.gradient_accumulation_steps)[:, None] * together + np.arange(micro)
        batches = []
        for places, indices in zip(positions.tolist(), self.order[positions].tolist(), strict=True):
            batch = collate(
                [_read(self.dataset, index, self.part) for index in indices], places, self.dataset.reference, self.part
            ).in_parts(count_parts(step, self._window_warmup_steps))
            batches.append(batch.pin_memory() if self._pin_memory else batch)
        return batches

    def taken(self, step: int) -> dict[str, int]:
        """Windows of each source, by fingerprint, that were taken before `step`."""
        return self.order.taken((step - self.first_step) * self.global_batch_size)

    def iterate(self, start_step: int = 0, *, ahead: bool = True) -> Generator[list[Batch], None, None]:
        """`step_batches` of `start_step`, `start_step + 1`, ... without end; `ahead`: a thread reads the next one.

        Close the generator (or let it go) to end the thread; an error of reading is raised at the step it concerns.
        """
        if not ahead:
            yield from map(self.step_batches, itertools.count(start_step))
        with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="batch-loader") as pool:
            coming = pool.submit(self.step_batches, start_step)
            for step in itertools.count(start_step + 1):
                batches = coming.result()
                coming = pool.submit(self.step_batches, step)
                yield batches


def count_parts(step: int, warmup_steps: int) -> int:
    """In how many parts step `step` (from 0) reads a window: 4 in the first half of the warm-up, then 2, then 1."""
    return 4 if 2 * step < warmup_steps else 2 if step < warmup_steps else 1


def order_windows(
    dataset: Dataset, seed: int, global_batch_size: int, first_step: int = 0, taken: Mapping[str, int] | None = None
) -> ShuffledOrder | MixtureOrder:
    """The order in which training takes the windows, place 0 being the first of `first_step`; see `BatchLoader`."""
    if not isinstance(dataset, Mixture):
        return ShuffledOrder(len(dataset), seed, dataset.fingerprint, taken)
    now = max(number for number, (step, _) in enumerate(dataset.shares) if step <= first_step)
    shares = [(max(0, step - first_step) * global_batch_size, weights) for step, weights in dataset.shares[now:]]
    return MixtureOrder(dataset.sources, seed, shares, taken or {})


def eval_batches(
    dataset: Dataset,
    micro_batch_size: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    part: SequencePart = WHOLE,
    *,
    max_samples: int | None = None,
    windows: range | None = None,
) -> Iterator[Batch]:
    """This rank's part of the first `max_samples` windows (None = all) of `windows` (None = of all), in order, each on
    exactly one rank.

    All ranks take the same number of batches, so that collectives match: places behind the last window hold its
    copy with no labels. The windows taken do not depend on the number of ranks or the batch size.
    """
    windows = (range(len(dataset)) if windows is None else windows)[:max_samples]
    for base in range(windows.start, windows.stop, micro_batch_size * dp_size):
        first = base + dp_rank * micro_batch_size
        positions = [p if p < windows.stop else -1 for p in range(first, first + micro_batch_size)]
        samples = [_take(dataset, p, windows.stop - 1, part) for p in positions]
        yield collate(samples, positions, dataset.reference, part)


def collate(
    samples: Sequence[Sample],
    positions: Iterable[int],
    reference: np.ndarray | None = None,
    part: SequencePart = WHOLE,
) -> Batch:
    """Stack B windows; their ends are boundaries of `cu_seqlens` too.

    Args:
        reference: (num_documents, 2) float32 of preferences, see `Dataset.reference`.
        part: which of each window the samples are.
    """
    input_ids = np.stack([sample.input_ids for sample in samples])  # (B, T)
    labels = np.stack([sample.labels for sample in samples])  # (B, T)
    starts = [sample.document_starts for sample in samples if sample.document_starts is not None]
    position_ids = cu_seqlens = None
    if starts:
        size, seq_len = len(input_ids), input_ids.shape[1] * part.count
        inner = [window * seq_len + np.append(0, offsets) for window, offsets in enumerate(starts)]
        bounds = np.append(np.concatenate(inner), size * seq_len)  # (num_segments + 1,)
        firsts = np.repeat(bounds[:-1], np.diff(bounds))  # (B*T,) first token of each token's segment
        in_documents = (np.arange(size * seq_len) - firsts).reshape(size, seq_len)
        position_ids = torch.from_numpy(in_documents[:, part.columns(seq_len)])
        cu_seqlens = torch.from_numpy(bounds.astype(np.int32))
    elif part.count > 1:
        first = part.index * input_ids.shape[1]
        position_ids = torch.arange(first, first + input_ids.shape[1]).expand(input_ids.shape)
    batch = Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(labels),
        position_ids,
        cu_seqlens,
        tuple(positions),
        int(np.count_nonzero(labels != IGNORED_LABEL)),
    )
    soft = [(sample.soft_ids, sample.soft_log_probs) for sample in samples if sample.soft_ids is not None]
    if soft:
        soft_ids, soft_log_probs = (torch.from_numpy(np.stack(values)) for values in zip(*soft, strict=True))
        batch = dataclasses.replace(batch, soft_ids=soft_ids, soft_log_probs=soft_log_probs)
    sources = [sample.source for sample in samples if sample.source is not None]
    if sources:
        batch = dataclasses.replace(batch, sources=torch.tensor(sources), num_sources=samples[0].num_sources)
    return batch if samples[0].pairs is None else _with_pairs(batch, samples, reference)


def _with_pairs(batch: Batch, samples: Sequence[Sample], reference: np.ndarray | None) -> Batch:
    """The batch with its pairs, numbered from window to window."""
    answers: list[np.ndarray] = []
    pairs: list[int] = []
    liked: list[np.ndarray] = []
    for sample in samples:
        assert sample.answers is not None and sample.pairs is not None and sample.liked is not None
        answers.append(np.where(sample.answers < 0, -1, sample.answers + 2 * len(pairs)))
        pairs += sample.pairs.tolist()
        liked.append(sample.liked)
    values = None if reference is None else torch.from_numpy(reference[pairs].reshape(-1))
    return dataclasses.replace(
        batch,
        answers=torch.from_numpy(np.stack(answers)),
        pairs=tuple(pairs),
        liked=torch.from_numpy(np.concatenate(liked)),
        reference=values,
    )


def _read(dataset: Dataset, index: int, part: SequencePart) -> Sample:
    sample = dataset.read(index, part)
    if dataset.soft_labels is None:
        return sample
    soft_ids, soft_log_probs = dataset.soft_labels[index]
    columns = part.columns(dataset.seq_len)
    return dataclasses.replace(sample, soft_ids=soft_ids[columns], soft_log_probs=soft_log_probs[columns])


def _take(dataset: Dataset, position: int, last: int, part: SequencePart) -> Sample:
    sample = _read(dataset, position if position >= 0 else last, part)
    if position >= 0:
        return sample
    labels = np.full_like(sample.labels, IGNORED_LABEL)
    if sample.pairs is None or sample.liked is None:
        return dataclasses.replace(sample, labels=labels)
    nothing: dict[str, Any] = {
        "pairs": sample.pairs[:0],
        "answers": np.full_like(labels, -1),
        "liked": sample.liked[:0],
    }
    return dataclasses.replace(sample, labels=labels, **nothing)
