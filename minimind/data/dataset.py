"""Window i of the token stream as a training sample: inputs and labels.

Documents are joined in the stream, each closed by its end token, and windows tile it without padding.
"""

import dataclasses
from pathlib import Path

import numpy as np

from minimind.data.manifest import ShardError
from minimind.data.shards import ShardReader, open_split

IGNORED_LABEL = -100


@dataclasses.dataclass(frozen=True)
class Sample:
    """One window of T tokens. `labels[t]` is the target of position t; `IGNORED_LABEL` counts for nothing.

    `document_starts` (document mask only): increasing offsets in (0, T) at which a new document begins.
    """

    input_ids: np.ndarray  # (T,) int64
    labels: np.ndarray  # (T,) int64
    document_starts: np.ndarray | None = None  # (num_starts,) int64


class TokenDataset:
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

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.seq_len
        length = min(self.seq_len, self.num_targets - start)
        tokens = self.reader.read(start, length + 1)
        input_ids = np.full(self.seq_len, self.reader.manifest.eos_token_id, dtype=np.int64)
        labels = np.full(self.seq_len, IGNORED_LABEL, dtype=np.int64)
        input_ids[:length], labels[:length] = tokens[:-1], tokens[1:]
        if not self.document_mask:
            return Sample(input_ids, labels)
        starts = self.reader.document_starts(start, length + 1)
        starts = starts[starts > 0]
        labels[starts - 1] = IGNORED_LABEL
        return Sample(input_ids, labels, starts[starts < length])


def load_shards(
    folder: str | Path, split: str = "train", *, seq_len: int = 512, document_mask: bool = False
) -> TokenDataset:
    """The windows of a corpus folder's `split`, or of a single shard folder (see `TokenDataset`).

    Raises:
        ShardError: the folder has no such split, is damaged, or is too small for a single window.
    """
    return TokenDataset(open_split(Path(folder), split), seq_len, document_mask)
