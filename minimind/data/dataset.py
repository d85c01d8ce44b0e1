"""Window i as a training sample: inputs and labels.

Of the token stream, in which documents are joined and windows tile them without padding, or of whole documents packed
into windows.
"""

import abc
import dataclasses
import functools
from pathlib import Path

import numpy as np

from minimind.data.manifest import DISLIKED_TARGET, REJECTED_START, REJECTED_TARGET, TARGET, ShardError
from minimind.data.packing import pack
from minimind.data.shards import ShardReader, open_split
from minimind.data.soft_labels import SoftLabels

IGNORED_LABEL = -100


@dataclasses.dataclass(frozen=True)
class SequencePart:
    """One of `count` equal parts of every window, where as many ranks share it."""

    index: int = 0
    count: int = 1

    def columns(self, seq_len: int) -> slice:
        """Its positions in a window."""
        length = seq_len // self.count
        return slice(self.index * length, (self.index + 1) * length)


WHOLE = SequencePart()


@dataclasses.dataclass(frozen=True)
class Sample:
    """One window of T tokens, or a part of one. `labels[t]` is the target of position t; `IGNORED_LABEL` counts for
    nothing.

    `document_starts` (document mask only): increasing offsets in the window at which a new document begins.
    """

    input_ids: np.ndarray  # (T,) int64
    labels: np.ndarray  # (T,) int64
    document_starts: np.ndarray | None = None  # (num_starts,) int64
    pairs: np.ndarray | None = None  # (num_pairs,) int64 of preferences: the documents
    answers: np.ndarray | None = None  # (T,) int64 of preferences: 2 * pair + (1 if rejected), -1 without a label
    soft_ids: np.ndarray | None = None  # (T, k) int64, see `minimind.data.soft_labels`
    soft_log_probs: np.ndarray | None = None  # (T, k) float32
    liked: np.ndarray | None = None  # (num_pairs,) bool of preferences: False for feedback against the first answer
    source: int | None = None  # of a mixture: the number of its source...
    num_sources: int = 0  # ... of so many


class Dataset(abc.ABC):
    """Windows of `seq_len` tokens of a corpus, or of a mixture of them (`minimind.data.mixture`)."""

    reader: ShardReader
    seq_len: int
    document_mask: bool
    is_packed = False
    reference: np.ndarray | None = None
    """(num_documents, 2) float32 of preferences: log-probability of the preferred and of the rejected answer under the
    model that training began with. Set by an objective that compares with it."""
    soft_labels: SoftLabels | None = None
    """Of the windows, where an objective has set them."""

    @property
    def readers(self) -> tuple[ShardReader, ...]:
        """Of all that is read."""
        return (self.reader,)

    @property
    def fingerprint(self) -> str:
        """What identifies the windows, beside their length."""
        return self.reader.fingerprint

    @property
    def num_tokens(self) -> int:
        return sum(reader.num_tokens for reader in self.readers)

    @abc.abstractmethod
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        return self.read(index)

    @abc.abstractmethod
    def read(self, index: int, part: SequencePart = WHOLE) -> Sample:
        """A part of window `index`."""


class TokenDataset(Dataset):
    """The windows of `seq_len` tokens of one shard folder: window i predicts tokens i*T + 1 .. (i + 1)*T.

    With `document_mask` a sample says where documents begin, and the first token of a document is no target
    (no earlier document may be used to guess it). With `keep_tail` (evaluation) the tokens after the last whole
    window form one more, filled up with end tokens that have no label; without, they are left out.
    Raises `ShardError` when the folder is too small for a single window.
    """

    def __init__(
        self, reader: ShardReader, seq_len: int, document_mask: bool = False, *, keep_tail: bool = False
    ) -> None:
        self.reader = reader
        self.seq_len = seq_len
        self.document_mask = document_mask
        self.num_targets = reader.num_tokens - 1 if keep_tail else (reader.num_tokens - 1) // seq_len * seq_len
        if self.num_targets < 1:
            needed = 2 if keep_tail else seq_len + 1
            raise ShardError(
                f"{reader.folder} has {reader.num_tokens} tokens, a window of seq_len {seq_len} needs {needed}: "
                f"prepare more text{'' if keep_tail else ' or lower --seq-len'}"
            )

    def __len__(self) -> int:
        return -(-self.num_targets // self.seq_len)

    def read(self, index: int, part: SequencePart = WHOLE) -> Sample:
        """A part of window `index`; no other tokens are read."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start, columns = index * self.seq_len, part.columns(self.seq_len)
        length = min(self.seq_len, self.num_targets - start)
        num_here = max(0, min(columns.stop, length) - columns.start)
        input_ids = np.full(self.seq_len // part.count, self.reader.manifest.eos_token_id, dtype=np.int64)
        labels = np.full_like(input_ids, IGNORED_LABEL)
        if num_here:
            tokens = self.reader.read(start + columns.start, num_here + 1)
            input_ids[:num_here], labels[:num_here] = tokens[:-1], tokens[1:]
        if not self.document_mask:
            return Sample(input_ids, labels)
        starts = self.reader.document_starts(start, length + 1)
        starts = starts[starts > 0]
        lasts = starts - 1 - columns.start
        labels[lasts[(lasts >= 0) & (lasts < len(labels))]] = IGNORED_LABEL
        return Sample(input_ids, labels, starts[starts < length])


class PackedDataset(Dataset):
    """Windows of `seq_len` tokens that hold whole documents (`minimind.data.packing`), each attending to itself alone.

    The first token of a document is no target; of a conversation only what the assistant wrote is one. A document
    longer than a window is cut at its end. What is left of a window is one more segment, of end tokens without labels.
    A pair of conversations takes two segments of one window; one longer than a window is left out. With `alone` each
    conversation has a window of its own, or is left out too.
    """

    document_mask = True
    is_packed = True

    def __init__(self, reader: ShardReader, seq_len: int, *, alone: bool = False) -> None:
        self.reader = reader
        self.seq_len = seq_len
        self._starts = np.append(reader.document_starts(0, reader.num_tokens), reader.num_tokens)
        # (num_documents,) positions that predict one of its tokens; an empty document still takes one.
        lengths = np.maximum(np.diff(self._starts) - 1, 1)
        if not lengths.size:
            raise ShardError(f"{reader.folder} holds no document: prepare more text")
        self.num_cut = int(np.count_nonzero(lengths > seq_len))
        """Documents whose end does not fit a window; of pairs, those that are left out."""
        self._lengths = np.minimum(lengths, seq_len)
        is_pairs = reader.manifest.is_pairs
        kept = np.flatnonzero(lengths <= seq_len) if is_pairs or alone else np.arange(len(lengths))
        if not kept.size:
            one = "pair" if is_pairs else "conversation"
            raise ShardError(
                f"{reader.folder}: no {one} fits a window of seq_len {seq_len}: the shortest takes {lengths.min()}"
            )
        order, self._bounds = pack(np.full(len(kept), seq_len) if alone else lengths[kept], seq_len)
        self._order = kept[order]

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @property
    def padding(self) -> float:
        """Fraction of the windows that no document fills."""
        return 1 - int(self._lengths[self._order].sum()) / (len(self) * self.seq_len)

    @functools.cached_property
    def num_targets(self) -> int:
        """Labels that count, over all windows."""
        return sum(int(np.count_nonzero(self[index].labels != IGNORED_LABEL)) for index in range(len(self)))

    def read(self, index: int, part: SequencePart = WHOLE) -> Sample:
        """A part of window `index`; of texts and conversations no other tokens are read."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        columns = part.columns(self.seq_len)
        input_ids = np.full(self.seq_len, self.reader.manifest.eos_token_id, dtype=np.int64)
        labels = np.full(self.seq_len, IGNORED_LABEL, dtype=np.int64)
        documents = self._order[self._bounds[index] : self._bounds[index + 1]]
        is_pairs = self.reader.manifest.is_pairs
        answers = np.full(self.seq_len, -1, dtype=np.int64)
        liked = np.ones(len(documents), dtype=bool)
        ends, end = [], 0
        for pair, document in enumerate(documents):
            start, length = int(self._starts[document]), int(self._lengths[document])
            low, high = (0, length) if is_pairs else (max(0, columns.start - end), min(length, columns.stop - end))
            if low >= high:
                ends.append(end := end + length)
                continue
            tokens = self.reader.read(start + low, min(high + 1, int(self._starts[document + 1]) - start) - low)
            here = slice(end + low, end + low + len(tokens) - 1)
            input_ids[here], labels[here] = tokens[:-1], tokens[1:]
            if self.reader.manifest.is_chat:
                targets = self.reader.read_targets(start + low + 1, len(tokens) - 1)
                is_target = np.isin(targets, (TARGET, REJECTED_TARGET, DISLIKED_TARGET))
                labels[here][~is_target] = IGNORED_LABEL
                answers[here][is_target] = 2 * pair + (targets[is_target] == REJECTED_TARGET)
                liked[pair] = DISLIKED_TARGET not in targets
                if is_pairs:  # the second conversation's first token is an input one position after it is a label
                    ends.append(end + 1 + int(np.argmax(targets == REJECTED_START)))
            ends.append(end := end + length)
        starts = np.array([offset for offset in ends if offset < self.seq_len], dtype=np.int64)
        if not is_pairs:
            return Sample(input_ids[columns], labels[columns], starts)
        return Sample(input_ids[columns], labels[columns], starts, documents, answers[columns], liked=liked)


def load_shards(
    folder: str | Path, split: str = "train", *, seq_len: int = 512, document_mask: bool = False, packed: bool = False
) -> TokenDataset | PackedDataset:
    """The windows of a corpus folder's `split`, or of a single shard folder: of the token stream (`TokenDataset`), or
    with `packed`, and for conversations always, of whole documents (`PackedDataset`).

    Raises:
        ShardError: the folder has no such split, is damaged, or is too small for a single window.
    """
    return open_dataset(open_split(Path(folder), split), seq_len, document_mask, packed=packed)


def open_dataset(
    reader: ShardReader,
    seq_len: int,
    document_mask: bool = False,
    *,
    packed: bool = False,
    keep_tail: bool = False,
    alone: bool = False,
) -> TokenDataset | PackedDataset:
    """The windows of one shard folder; arguments as of `load_shards`, `TokenDataset` and `PackedDataset`.

    Raises:
        ShardError: it is too small for a single window.
    """
    if packed or reader.manifest.is_chat:
        return PackedDataset(reader, seq_len, alone=alone)
    return TokenDataset(reader, seq_len, document_mask, keep_tail=keep_tail)
